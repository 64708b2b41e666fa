// Gradients of whole models: against differences of the loss, against PyTorch's, and between the ways to
// compute them.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/models/load.h"
#include "models/odd_configs.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden;
using testing::golden_array;
using testing::max_difference;
using testing::odd_configs;

using Gradients = std::map<std::string, Tensor>;

LanguageModel fresh_model(const std::string& json, std::uint64_t seed = 5) {
  LanguageModel model(parse_config(json, "test"));
  model.initialize(seed);
  return model;
}

TrainingBatch random_batch(std::int64_t rows, std::int64_t length, std::uint64_t seed = 9) {
  Rng rng(seed);
  TrainingBatch batch{.inputs = Tensor::empty({rows, length}, DType::i64),
                      .targets = Tensor::empty({rows, length}, DType::i64)};
  for (const Tensor& t : {batch.inputs, batch.targets})
    for (std::int64_t& id : t.span<std::int64_t>()) id = rng.next_u32() % 50;
  batch.targets.data<std::int64_t>()[1] = TrainingBatch::kNoLoss;
  return batch;
}

TrainingBatch rows_of(const TrainingBatch& batch, std::int64_t begin, std::int64_t end) {
  return {.inputs = batch.inputs.slice(0, begin, end),
          .targets = batch.targets.slice(0, begin, end),
          .seq_idx = batch.seq_idx ? batch.seq_idx.slice(0, begin, end) : Tensor()};
}

TrainingBatch columns_of(const TrainingBatch& batch, std::int64_t begin, std::int64_t end) {
  return {.inputs = batch.inputs.slice(1, begin, end), .targets = batch.targets.slice(1, begin, end)};
}

double sum_of(const CrossEntropyResult& loss) { return loss.mean * static_cast<double>(loss.count); }

Gradients gradients_of(Context& ctx, LanguageModel& model, const TrainingBatch& batch, Tape& tape) {
  model.drop_gradients();
  model.zero_gradients(ctx);
  tape.begin(3);
  model.accumulate_gradients(ctx, batch, tape, 0.25);
  Gradients gradients;
  model.visit([&](const Parameter& p) { gradients[p.name] = ctx.to_host(p.gradient).clone(); });
  return gradients;
}

void expect_equal_bits(const Gradients& found, const Gradients& wanted) {
  for (const auto& [name, gradient] : wanted)
    EXPECT_EQ(max_difference(found.at(name), gradient), 0.0) << name;
}

// Each parameter moves along its own gradient g: the loss must change by |g|^2 times the length of the move.
void expect_gradients_of_loss(Context& ctx, LanguageModel& model, const TrainingBatch& batch,
                              const TapeOptions& options = {}) {
  Tape tape(options);
  const auto loss = [&] {
    model.prepare(ctx);
    tape.begin(3);
    return sum_of(model.accumulate_gradients(ctx, batch, tape, 0.0));
  };
  const Gradients gradients = gradients_of(ctx, model, batch, tape);
  model.visit([&](const Parameter& p) {
    SCOPED_TRACE(p.name);
    const Tensor& g = gradients.at(p.name);
    double square = 0.0;
    for (const float value : g.span<float>()) square += static_cast<double>(value) * value;
    ASSERT_GT(square, 0.0);
    const double norm = std::sqrt(square);
    const Tensor start = p.tensor.clone();
    // Several lengths: differences of f32 losses are coarse for a short one, curved for a long one.
    double best = INFINITY;
    for (const double length : {1e-1, 3e-2, 1e-2, 3e-3, 1e-3}) {
      const auto loss_at = [&](double by) {
        for (std::int64_t i = 0; i < g.numel(); ++i)
          p.tensor.data<float>()[i] =
              start.data<float>()[i] + static_cast<float>(by / norm) * g.data<float>()[i];
        return loss();
      };
      const double change = (loss_at(length) - loss_at(-length)) / (2.0 * length);
      best = std::min(best, std::abs(0.25 * change - norm));
    }
    p.tensor.copy_from(start);
    EXPECT_LT(best, 0.01 * norm + 2e-5) << "of a gradient of norm " << norm;
  });
  model.prepare(ctx);
}

TEST(Training, GradientsAreThoseOfTheLoss) {
  for (const auto& [name, json] : odd_configs()) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model = fresh_model(json);
    expect_gradients_of_loss(ctx, model, random_batch(2, 19));
  }
}

TEST(Training, GradientsWithDropoutAndDocuments) {
  TrainingBatch batch = random_batch(2, 17);
  batch.seq_idx = Tensor::zeros({2, 17}, DType::i32);
  for (std::int64_t t = 5; t < 17; ++t) batch.seq_idx.data<std::int32_t>()[t] = 1;
  for (std::int64_t t = 12; t < 17; ++t) batch.seq_idx.data<std::int32_t>()[17 + t] = 7;
  for (const auto& [name, json] : odd_configs()) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model = fresh_model(json);
    expect_gradients_of_loss(ctx, model, batch, {.dropout = 0.2, .seed = 4});
  }
}

TEST(Training, ReferencePathAgrees) {
  for (const auto& [name, json] : odd_configs()) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model = fresh_model(json);
    const TrainingBatch batch = random_batch(3, 70);
    Tape tape;
    const Gradients fast = gradients_of(ctx, model, batch, tape);
    ctx.set_reference(true);
    const Gradients slow = gradients_of(ctx, model, batch, tape);
    for (const auto& [parameter, gradient] : slow) {
      double largest = 0.0;
      for (const float value : gradient.span<float>()) largest = std::max(largest, std::abs(double{value}));
      EXPECT_LT(max_difference(fast.at(parameter), gradient), 1e-4 * largest + 1e-7) << parameter;
    }
  }
}

TEST(Training, TheGpuAgreesWithTheCpu) {
  if (!testing::on_gpu()) GTEST_SKIP() << "needs a GPU";
  TrainingBatch batch = random_batch(3, 70);
  for (const bool documents : {false, true}) {
    if (documents) {
      batch.seq_idx = Tensor::zeros({3, 70}, DType::i32);
      for (std::int64_t t = 40; t < 70; ++t) batch.seq_idx.data<std::int32_t>()[t] = 1;
    }
    for (const auto& [name, json] : odd_configs()) {
      SCOPED_TRACE(concat(name, documents ? ", documents" : ""));
      Context cpu;
      Context gpu(ContextOptions{.device = testing::test_device()});
      LanguageModel model = fresh_model(json);
      Tape tape({.dropout = 0.2, .seed = 4});
      const Gradients wanted = gradients_of(cpu, model, batch, tape);
      model.to_device(gpu);
      const Gradients found = gradients_of(gpu, model, batch, tape);
      for (const auto& [parameter, gradient] : wanted) {
        double largest = 0.0;
        for (const float value : gradient.span<float>()) largest = std::max(largest, std::abs(double{value}));
        EXPECT_LT(max_difference(found.at(parameter), gradient), 1e-4 * largest + 1e-7) << parameter;
      }
    }
  }
}

TEST(Training, RecomputationAndThreadsChangeNoBit) {
  for (const auto& [name, json] : odd_configs()) {
    SCOPED_TRACE(name);
    LanguageModel model = fresh_model(json);
    const TrainingBatch batch = random_batch(3, 70);
    Context one({.device = testing::test_device(), .threads = 1});
    Context three({.device = testing::test_device(), .threads = 3});
    model.to_device(one);
    Tape kept({.dropout = 0.3, .seed = 8});
    Tape recomputed({.recompute = Recompute::block, .dropout = 0.3, .seed = 8});
    const Gradients wanted = gradients_of(one, model, batch, kept);
    expect_equal_bits(gradients_of(three, model, batch, kept), wanted);
    expect_equal_bits(gradients_of(three, model, batch, recomputed), wanted);
    EXPECT_LT(recomputed.peak_bytes(), kept.peak_bytes());
    EXPECT_FALSE(kept.breakdown().empty());
  }
}

TEST(Training, TheTapeIsEmptyBehindAStep) {
  Context ctx;
  LanguageModel model = fresh_model(odd_configs().begin()->second);
  Tape tape;
  gradients_of(ctx, model, random_batch(2, 9), tape);
  EXPECT_EQ(tape.bytes(), 0U);
  EXPECT_GT(tape.peak_bytes(), 0U);
}

TEST(Training, PartsOfABatchAddUpToIt) {
  for (const auto& [name, json] : odd_configs()) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model = fresh_model(json);
    const TrainingBatch batch = random_batch(4, 33);
    Tape tape;
    const Gradients whole = gradients_of(ctx, model, batch, tape);
    model.zero_gradients(ctx);
    for (const auto& [begin, end] : {std::pair{0, 1}, std::pair{1, 4}}) {
      tape.begin();
      model.accumulate_gradients(ctx, rows_of(batch, begin, end), tape, 0.25);
    }
    model.visit(
        [&](const Parameter& p) { EXPECT_LT(max_difference(p.gradient, whole.at(p.name)), 2e-5) << p.name; });
  }
}

// Documents in one row give what each gives in a row of its own.
TEST(Training, DocumentsDoNotLeakIntoOneAnother) {
  for (const auto& [name, json] : odd_configs()) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model = fresh_model(json);
    TrainingBatch batch = random_batch(1, 40);
    batch.seq_idx = Tensor::zeros({1, 40}, DType::i32);
    for (std::int64_t t = 13; t < 40; ++t) batch.seq_idx.data<std::int32_t>()[t] = 1;
    Tape tape;
    const Gradients together = gradients_of(ctx, model, batch, tape);
    model.zero_gradients(ctx);
    for (const auto& [begin, end] : {std::pair{0, 13}, std::pair{13, 40}}) {
      tape.begin();
      model.accumulate_gradients(ctx, columns_of(batch, begin, end), tape, 0.25);
    }
    model.visit([&](const Parameter& p) {
      EXPECT_LT(max_difference(p.gradient, together.at(p.name)), 2e-5) << p.name;
    });
  }
}

TEST(Training, CarriedStatesContinueARow) {
  for (const char* name : {"mamba1 odd sizes", "mamba2 groups, hdim D, no norm", "mamba2 d_ssm", "falcon"}) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model = fresh_model(odd_configs().at(name));
    const TrainingBatch batch = random_batch(2, 40);
    Tape tape;
    model.zero_gradients(ctx);
    tape.begin();
    const CrossEntropyResult whole = model.accumulate_gradients(ctx, batch, tape, 1.0);
    for (const Recompute recompute : {Recompute::none, Recompute::block}) {
      Tape segments({.recompute = recompute});
      std::shared_ptr<StatePool> states = model.make_pool(2);
      const State first(states);
      const State second(states);
      for (const auto& [begin, end] : {std::pair{0, 23}, std::pair{23, 40}}) {
        TrainingBatch part = columns_of(batch, begin, end);
        part.states = states;
        segments.begin();
        const CrossEntropyResult loss = model.accumulate_gradients(ctx, part, segments, 1.0);
        for (std::int64_t row = 0; row < 2; ++row)
          EXPECT_LT(max_difference(loss.losses.slice(0, row * (end - begin), (row + 1) * (end - begin)),
                                   whole.losses.slice(0, row * 40 + begin, row * 40 + end)),
                    1e-4);
      }
    }
  }
}

TEST(Training, RecomputationWithCarriedStatesChangesNoBit) {
  Context ctx;
  LanguageModel model = fresh_model(odd_configs().at("mamba2 d_ssm"));
  const TrainingBatch batch = random_batch(2, 20);
  const auto second_segment = [&](Recompute recompute) {
    Tape tape({.recompute = recompute});
    TrainingBatch part = batch;
    part.states = model.make_pool(2);
    const State first(part.states);
    const State second(part.states);
    gradients_of(ctx, model, part, tape);
    return gradients_of(ctx, model, part, tape);
  };
  expect_equal_bits(second_segment(Recompute::block), second_segment(Recompute::none));
}

TEST(Training, StatesDoNotPassThroughAttention) {
  Context ctx;
  LanguageModel model = fresh_model(odd_configs().at("hybrid with mlp"));
  TrainingBatch batch = random_batch(1, 8);
  batch.states = model.make_pool(1);
  model.zero_gradients(ctx);
  Tape tape;
  EXPECT_THROW(model.accumulate_gradients(ctx, batch, tape, 1.0), Error);
}

TEST(Training, IdsOutsideOfTheVocabularyAreNamed) {
  Context ctx;
  LanguageModel model = fresh_model(odd_configs().begin()->second);
  TrainingBatch batch = random_batch(2, 8);
  batch.inputs.data<std::int64_t>()[11] = 50;
  Tape tape;
  try {
    model.accumulate_gradients(ctx, batch, tape, 1.0);
    FAIL() << "an id of 50 was taken";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "id 50 at position 3 of row 1, expected 0 to vocab_size - 1 = 49");
  }
}

// Gradients of step 0 that PyTorch computed through upstream's kernels.
TEST(Training, GradientsOfTheGolden) {
  constexpr const char* kName = "train-mamba1-tiny";
  Context ctx(ContextOptions{.device = testing::test_device()});
  LanguageModel model = load_language_model(ctx, open_model_directory(golden(kName)));
  const Tensor first = golden_array(kName, "batches.npy").select(0, 0).to(DType::i64);
  const std::int64_t length = first.size(1) - 1;
  const TrainingBatch batch{.inputs = first.slice(1, 0, length), .targets = first.slice(1, 1, length + 1)};
  model.zero_gradients(ctx);
  Tape tape;
  tape.begin();
  const CrossEntropyResult loss =
      model.accumulate_gradients(ctx, batch, tape, 1.0 / static_cast<double>(batch.inputs.numel()));
  const Tensor losses = golden_array(kName, "losses.npy").to(DType::f64).contiguous();
  EXPECT_NEAR(loss.mean, losses.data<double>()[0], 1e-4 * losses.data<double>()[0]);
  model.visit([&](const Parameter& p) {
    const Tensor want = golden_array(kName, "grad0__" + p.name + ".npy");
    double largest = 0.0;
    const Tensor flat = want.to(DType::f32).contiguous();
    for (const float value : flat.span<float>()) largest = std::max(largest, std::abs(double{value}));
    EXPECT_LT(max_difference(ctx.to_host(p.gradient), want), 1e-3 * largest) << p.name;
  });
}

}  // namespace
}  // namespace krait
