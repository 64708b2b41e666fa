// That measurements run and say what they measured; not how fast anything is.
#include "krait/bench/bench.h"

#include <gtest/gtest.h>

#include "krait/core/error.h"

namespace krait {
namespace {

TEST(Bench, EveryOperatorRuns) {
  Context ctx;
  for (const auto& [name, defaults] : bench_ops()) {
    SCOPED_TRACE(name);
    std::map<std::string, std::int64_t> tiny;
    for (const auto& [letter, size] : defaults)
      tiny[letter] = std::min<std::int64_t>(size, letter == "G" ? 1 : 4);
    const OpBench r = bench_op(ctx, name, tiny, DType::bf16, 1);
    EXPECT_GT(r.seconds, 0.0);
    EXPECT_GT(r.bytes, 0.0);
    EXPECT_GT(r.flops, 0.0);
    EXPECT_GT(r.ceilings.read_bytes_per_second, 0.0);
    EXPECT_NE(r.backend, "");
    EXPECT_NE(r.shape.find("=4"), std::string::npos);
    EXPECT_EQ(r.dtype, name == "state_update" ? "bf16, state bf16" : "bf16");
  }
  EXPECT_EQ(bench_op(ctx, "state_update", {{"B", 1}, {"H", 1}}, DType::f32, 1, DType::f16).dtype,
            "f32, state f16");
}

TEST(Bench, UnknownNamesAreErrors) {
  Context ctx;
  const auto message = [&](const std::string& name,
                           const std::map<std::string, std::int64_t>& shape) -> std::string {
    try {
      (void)bench_op(ctx, name, shape);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_NE(message("scan", {}).find("no operator scan, expected one of attention, "), std::string::npos);
  EXPECT_EQ(message("linear", {{"X", 2}}), "bench op linear: shape has X, expected I, O, T");
  EXPECT_EQ(message("linear", {{"T", 0}}), "bench op linear: T is 0, expected at least 1");
}

TEST(Bench, ModelsReportWhatTheyDid) {
  Context ctx;
  LanguageModel model(parse_config(R"({"d_model": 32, "n_layer": 2, "vocab_size": 50})", "config"));
  model.initialize(1, DType::bf16);
  const ModelBench r =
      bench_model(ctx, model, {.prompt_length = 5, .new_tokens = 3, .batch = 2, .repeat = 1});
  const ModelBench narrow = bench_model(
      ctx, model, {.prompt_length = 5, .new_tokens = 3, .batch = 2, .repeat = 1, .state_dtype = DType::bf16});
  EXPECT_LT(narrow.state_bytes, r.state_bytes);
  EXPECT_GT(r.prefill_tokens_per_second, 0.0);
  EXPECT_GT(r.decode_tokens_per_second, 0.0);
  EXPECT_GT(r.weight_bytes, 0);
  EXPECT_GT(r.state_bytes, 0);
  EXPECT_GT(r.peak_memory_bytes, r.weight_bytes);
  EXPECT_THROW(bench_model(ctx, model, {.prompt_length = 0}), Error);
}

TEST(Bench, TrainingReportsWhatItDid) {
  Context ctx;
  const auto bench = [&](Recompute recompute, DType dtype) {
    LanguageModel model(parse_config(R"({"d_model": 32, "n_layer": 2, "vocab_size": 48})", "config"));
    model.initialize(1);
    return bench_training(
        ctx, model, {.batch_size = 2, .seq_len = 5, .dtype = dtype, .recompute = recompute, .repeat = 1});
  };
  const TrainBench r = bench(Recompute::none, DType::bf16);
  EXPECT_GT(r.tokens_per_second, 0.0);
  EXPECT_GT(r.share_of_flops, 0.0);
  EXPECT_GT(r.peak_memory_bytes, 16 * r.parameters);
  // The head and in_proj, x_proj, dt_proj and out_proj of two layers.
  EXPECT_EQ(r.multiplied_parameters, 48 * 32 + 2 * (32 * 128 + 64 * 34 + 2 * 64 + 64 * 32));
  EXPECT_GT(r.parameters, r.multiplied_parameters);
  std::size_t parts = 0;
  for (const auto& part : r.tape_parts) parts += part.second;
  EXPECT_GT(r.tape_bytes, 0);
  EXPECT_EQ(parts, static_cast<std::size_t>(r.tape_bytes));
  EXPECT_LT(bench(Recompute::block, DType::f32).tape_bytes, r.tape_bytes);
}

TEST(Bench, TrainingRefusesWhatItCannotMeasure) {
  Context ctx;
  LanguageModel model(parse_config(R"({"d_model": 32, "n_layer": 1, "vocab_size": 50})", "config"));
  model.initialize(1);
  EXPECT_THROW(bench_training(ctx, model, {.batch_size = 0}), Error);
  EXPECT_THROW(bench_training(ctx, model, {.seq_len = 0}), Error);
  EXPECT_THROW(bench_training(ctx, model, {.dtype = DType::f16}), Error);
}

}  // namespace
}  // namespace krait
