#include <cmath>

#include "apps/process.h"
#include "krait/io/npy.h"

namespace krait::cli {
namespace {

// Mean cross-entropy of golden logits, in double.
double golden_loss(const std::string& model) {
  const Tensor logits = io::read_npy(golden(model + "/logits.npy"));
  const Tensor ids = io::read_npy(golden(model + "/input_ids.npy")).to(DType::i64).contiguous();
  double sum = 0.0;
  for (std::int64_t b = 0; b < ids.size(0); ++b) {
    const auto targets = ids.select(0, b).span<std::int64_t>();
    for (std::int64_t t = 0; t + 1 < ids.size(1); ++t) {
      const auto row = logits.select(0, b).select(0, t).span<float>();
      double total = 0.0;
      for (const float x : row) total += std::exp(static_cast<double>(x));
      sum += std::log(total) -
             static_cast<double>(row[static_cast<std::size_t>(targets[static_cast<std::size_t>(t) + 1])]);
    }
  }
  return sum / static_cast<double>(ids.size(0) * (ids.size(1) - 1));
}

TEST(Score, IdsGiveTheLossOfTheGoldenLogits) {
  for (const std::string model : {"mamba1-tiny", "mamba2-tiny", "hf-gptneox-tiny"}) {
    SCOPED_TRACE(model);
    const auto root =
        krait_ok({"score", "--model", golden(model), "--ids", golden(model + "/input_ids.npy"), "--json"})
            .json();
    EXPECT_NEAR(root["loss"].get<double>(), golden_loss(model), 1e-4);
    EXPECT_NEAR(root["perplexity"].get<double>(), std::exp(root["loss"].get<double>()),
                1e-6 * root["perplexity"].get<double>());
    EXPECT_EQ(root["tokens"], 2 * 74);
    EXPECT_FALSE(root.contains("bits_per_byte"));
  }
}

TEST(Score, TextCountsItsBytes) {
  const std::string text = "ROMEO:\nBut, soft! what light through yonder window breaks?\n";
  const auto root = krait_ok({"score", "--text", "-", "--json"}, text).json();
  const double tokens = root["tokens"].get<double>() + 1;  // the first is given, not predicted
  EXPECT_NEAR(root["bits_per_byte"].get<double>(),
              root["loss"].get<double>() / std::log(2.0) * tokens / static_cast<double>(text.size()), 1e-9);
  const Outcome plain = krait_ok({"score", "--text", "-"}, text);
  for (const char* row : {"loss ", "perplexity ", "bits per byte ", "tokens "})
    EXPECT_NE(plain.out.find(row), std::string::npos) << plain.out;
  const auto blocks = krait_ok({"score", "--text", "-", "--block", "8", "--json"}, text).json();
  EXPECT_NE(blocks["loss"], root["loss"]);
}

TEST(Info, CountsTheParameters) {
  const auto root = krait_ok({"info", "--json"}).json();
  EXPECT_EQ(root["architecture"], "6 x Mamba2");
  EXPECT_EQ(root["d_model"], 192);
  std::int64_t sum = 0;
  for (const auto& [part, count] : root["parameters_by_part"].items()) sum += count.get<std::int64_t>();
  EXPECT_EQ(sum, root["parameters"]);
  EXPECT_NEAR(root["parameters"].get<double>(), 1.70e6, 0.01e6);
  EXPECT_GT(root["bytes_by_dtype"]["f16"].get<std::int64_t>(), 2'000'000);
  EXPECT_GT(root["state_bytes_per_sequence"].get<std::int64_t>(), 0);
  EXPECT_EQ(root["state_bytes_per_token"], 0);
  EXPECT_NE(krait_ok({"info"}).out.find("6 x Mamba2"), std::string::npos);

  const auto bf16 = krait_ok({"info", "--json", "--dtype", "bf16"}).json();
  EXPECT_EQ(bf16["bytes_by_dtype"]["bf16"], root["bytes_by_dtype"]["f16"]);
  EXPECT_FALSE(bf16["bytes_by_dtype"].contains("f16"));
  const auto attention = krait_ok({"info", "--model", golden("transformerpp-tiny"), "--json"}).json();
  EXPECT_GT(attention["state_bytes_per_token"].get<std::int64_t>(), 0);
}

TEST(Bench, MeasuresAModel) {
  const auto root =
      krait_ok({"bench", "--prompt-length", "16", "--new-tokens", "4", "--repeat", "1", "--json"}).json();
  for (const char* name :
       {"prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "peak_memory_bytes"})
    EXPECT_GT(root[name].get<double>(), 0.0) << name;
  const Outcome plain = krait_ok({"bench", "--config", golden("mamba1-tiny/config.json"), "--prompt-length",
                                  "8", "--new-tokens", "2", "--repeat", "1", "--dtype", "bf16"});
  EXPECT_NE(plain.out.find("decode "), std::string::npos) << plain.out;
}

TEST(Bench, MeasuresAnOperator) {
  const auto root = krait_ok({"bench", "op", "linear", "--repeat", "2", "--json"}).json();
  EXPECT_EQ(root["op"], "linear");
  EXPECT_GT(root["flops_per_second"].get<double>(), 0.0);
  EXPECT_GT(root["read_bytes_per_second_ceiling"].get<double>(), 0.0);
}

}  // namespace
}  // namespace krait::cli
