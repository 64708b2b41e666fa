#include "krait/train/trainer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "io/scratch.h"
#include "train/tiny.h"

namespace krait {
namespace {

TrainSettings quick(std::int64_t steps) {
  TrainSettings settings;
  settings.steps = steps;
  settings.lr = 1e-2;
  return settings;
}

// Every weight of the last step, one after the other.
std::vector<float> all_weights(const Trainer& trainer, Trainer::Weights which = Trainer::Weights::last) {
  std::vector<float> all;
  for (const auto& [name, tensor] : trainer.weights(which)) {
    const auto values = tensor.span<float>();
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - b[i]));
  return largest;
}

TEST(Trainer, LearnsToCount) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    Context ctx;
    LanguageModel model = tiny_model();
    const CountingData data(4, 24);
    TrainSettings settings = quick(60);
    settings.dtype = dtype;
    Trainer trainer(ctx, model, data, settings);
    const StepReport first = trainer.step();
    EXPECT_NEAR(first.loss, std::log(48.0), 0.5);
    EXPECT_EQ(first.step, 1);
    EXPECT_EQ(first.lr, 1e-2);
    EXPECT_EQ(first.tokens, 4 * 24);
    StepReport last;
    while (trainer.step_number() < trainer.steps()) last = trainer.step();
    EXPECT_EQ(last.step, 60);
    EXPECT_EQ(last.tokens, 60 * 4 * 24);
    EXPECT_LT(last.loss, 0.5 * first.loss);
    EXPECT_EQ(last.skipped, 0);
  }
}

TEST(Trainer, ComputesWithBf16AndEvaluatesWithMasterWeights) {
  Context ctx;
  LanguageModel model = tiny_model();
  const CountingData data(2, 8);
  TrainSettings settings = quick(3);
  settings.dtype = DType::bf16;
  Trainer trainer(ctx, model, data, settings);
  trainer.step();
  const auto dtypes = [&] {
    std::map<ParameterKind, DType> found;
    model.visit([&](const Parameter& p) { found[p.kind] = p.tensor.dtype(); });
    return found;
  };
  EXPECT_EQ(dtypes()[ParameterKind::matrix], DType::bf16);
  EXPECT_EQ(dtypes()[ParameterKind::small], DType::f32);
  // The copies are the master weights, rounded.
  const io::TensorMap masters = trainer.weights(Trainer::Weights::last);
  model.visit([&](const Parameter& p) {
    if (p.kind != ParameterKind::matrix) return;
    EXPECT_EQ(io::values_of<float>(p.tensor.to(DType::f32)),
              io::values_of<float>(masters.at(p.name).to(DType::bf16).to(DType::f32)))
        << p.name;
  });
  trainer.with_weights(Trainer::Weights::last, [&] {
    EXPECT_EQ(dtypes()[ParameterKind::matrix], DType::f32);
    model.visit([&](const Parameter& p) { EXPECT_EQ(p.tensor.raw(), masters.at(p.name).raw()) << p.name; });
  });
  EXPECT_EQ(dtypes()[ParameterKind::matrix], DType::bf16);
}

TEST(Trainer, AccumulationIsTheLargeBatch) {
  const auto run = [](std::int64_t rows, std::int64_t accumulate) {
    Context ctx;
    LanguageModel model = tiny_model();
    CountingData data(rows, 16);
    data.set_ragged();
    TrainSettings settings = quick(5);
    settings.accumulate = accumulate;
    settings.eps = 1e-3;  // AdamW makes large steps of gradients that are rounding alone
    Trainer trainer(ctx, model, data, settings);
    std::vector<double> losses;
    for (int i = 0; i < 5; ++i) losses.push_back(trainer.step().loss);
    return std::pair(losses, all_weights(trainer));
  };
  const auto [large_losses, large] = run(8, 1);
  const auto [small_losses, small] = run(2, 4);
  for (std::size_t i = 0; i < 5; ++i) EXPECT_NEAR(small_losses[i], large_losses[i], 1e-4) << "step " << i;
  EXPECT_LT(largest_difference(small, large), 1e-4);
}

// What a run is made of: everything that has a state of its own.
TrainSettings involved() {
  TrainSettings settings = quick(9);
  settings.accumulate = 2;
  settings.dropout = 0.2;
  settings.ema = 0.9;
  settings.carry_state = true;
  settings.schedule = Schedule::cosine;
  settings.warmup = 3;
  settings.seed = 12;
  return settings;
}

TEST(Trainer, GoesOnBitForBit) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    TrainSettings settings = involved();
    settings.dtype = dtype;
    const CountingData data(3, 12);
    Context ctx;
    LanguageModel whole_model = tiny_model();
    Trainer whole(ctx, whole_model, data, settings);
    for (int i = 0; i < 9; ++i) whole.step();
    for (const int cut : {0, 1, 4, 8}) {
      SCOPED_TRACE(testing::Message() << name_of(dtype) << ", cut after " << cut << " steps");
      LanguageModel first_model = tiny_model();
      Trainer first(ctx, first_model, data, settings);
      for (int i = 0; i < cut; ++i) first.step();
      // Another model, with other weights, on another number of threads.
      Context other({.threads = 3});
      LanguageModel second_model(tiny_config());
      second_model.initialize(99);
      Trainer second(other, second_model, data, settings);
      second.restore(first.state(), first.snapshot(), "snapshot");
      StepReport last;
      for (int i = cut; i < 9; ++i) last = second.step();
      EXPECT_EQ(last.step, 9);
      EXPECT_EQ(last.tokens, 9 * 2 * 3 * 12);
      EXPECT_EQ(all_weights(second), all_weights(whole));
      EXPECT_EQ(all_weights(second, Trainer::Weights::average),
                all_weights(whole, Trainer::Weights::average));
    }
  }
}

TEST(Trainer, RefusesWhatItCannotGoOnFrom) {
  Context ctx;
  const CountingData data(3, 12);
  LanguageModel model = tiny_model();
  Trainer trainer(ctx, model, data, involved());
  const TrainerState state = trainer.state();
  const auto message = [&](const TrainerState& from, const Trainer::Snapshot& snapshot) {
    return io::message_of([&] { trainer.restore(from, snapshot, "step-5"); });
  };
  TrainerState other = state;
  other.seed = 13;
  EXPECT_EQ(message(other, trainer.snapshot()), "step-5: was made with seed 13, now it is 12");
  other = state;
  other.data_tokens = 10;
  EXPECT_EQ(message(other, trainer.snapshot()),
            "step-5: was made with data of 10 tokens, now there are 3600 in the data set");
  other = state;
  other.data_checksum += 1;
  EXPECT_EQ(message(other, trainer.snapshot()),
            "step-5: was made with other data: the data set has as many tokens as before, but not the same");
  for (const auto& [batches, updates] :
       std::vector<std::pair<std::int64_t, std::int64_t>>{{-1, 0}, {1, 0}, {0, -1}, {0, 1}}) {
    other = state;
    other.batches = batches;
    other.updates = updates;
    EXPECT_NE(message(other, trainer.snapshot()).find("step-5: its counts do not fit together"),
              std::string::npos)
        << batches << " batches, " << updates << " updates";
  }
  Trainer::Snapshot lacking = trainer.snapshot();
  lacking.optimizer.erase("m.backbone.embedding.weight");
  EXPECT_EQ(message(state, lacking),
            "step-5: tensor m.backbone.embedding.weight is missing, expected shape (48, 32)");
  Trainer::Snapshot shaped = trainer.snapshot();
  shaped.model["backbone.embedding.weight"] = Tensor::zeros({48, 16});
  EXPECT_EQ(message(state, shaped),
            "step-5: tensor backbone.embedding.weight has shape (48, 16), expected (48, 32)");
  Trainer::Snapshot more = trainer.snapshot();
  more.model.emplace("extra", Tensor::zeros({1}));
  EXPECT_EQ(message(state, more),
            "step-5: unexpected tensor extra of shape (1,): the model has no such parameter");
  Trainer::Snapshot stateless = trainer.snapshot();
  stateless.optimizer.erase("state.0.ssm");
  EXPECT_NE(message(state, stateless).find("tensor state.0.ssm is missing"), std::string::npos);
}

// A model in whose embedding one token is not finite: batches with it give nothing finite.
constexpr std::int64_t kPoison = kTinyVocab - 1;

LanguageModel poisoned_model() {
  LanguageModel model = tiny_model(/*tied=*/false);
  model.visit([](const Parameter& p) {
    if (p.name == "backbone.embedding.weight") p.tensor.slice(0, kPoison, kPoison + 1).fill(INFINITY);
  });
  return model;
}

TEST(Trainer, StepsThatAreNotFiniteChangeNothing) {
  Context ctx;
  LanguageModel model = poisoned_model();
  CountingData data(2, 12);
  data.plant(2, kPoison);
  TrainSettings settings = quick(6);
  settings.carry_state = true;
  settings.no_decay = {"embedding"};  // which would make NaN of infinity
  Trainer trainer(ctx, model, data, settings);
  trainer.step();
  const StepReport before = trainer.step();
  const Trainer::Snapshot snapshot = trainer.snapshot();
  std::vector<std::vector<float>> kept;
  for (const auto& [name, tensor] : snapshot.optimizer)
    if (!name.starts_with("state.")) kept.push_back(io::values_of<float>(tensor));
  const auto weights = all_weights(trainer);
  const StepReport skipped = trainer.step();
  EXPECT_TRUE(skipped.was_skipped);
  EXPECT_FALSE(std::isfinite(skipped.loss) && std::isfinite(skipped.grad_norm));
  EXPECT_EQ(skipped.step, 3);
  EXPECT_EQ(skipped.skipped, 1);
  EXPECT_EQ(skipped.tokens, before.tokens);
  EXPECT_EQ(all_weights(trainer), weights);
  std::size_t i = 0;
  for (const auto& [name, tensor] : trainer.snapshot().optimizer) {
    if (name.starts_with("state.")) continue;
    EXPECT_EQ(io::values_of<float>(tensor), kept[i++]) << name;
  }
  const StepReport after = trainer.step();
  EXPECT_FALSE(after.was_skipped) << "states that were not finite went into the next step";
  EXPECT_EQ(after.skipped, 1);
  EXPECT_EQ(trainer.state().updates, 3);
}

TEST(Trainer, TenInARowAreTheEnd) {
  Context ctx;
  LanguageModel model = poisoned_model();
  CountingData data(2, 12);
  for (std::int64_t batch = 1; batch < 10; ++batch) data.plant(batch, kPoison);
  for (std::int64_t batch = 11; batch < 21; ++batch) data.plant(batch, kPoison);
  TrainSettings settings = quick(30);
  settings.no_decay = {"embedding"};
  Trainer trainer(ctx, model, data, settings);
  for (int i = 0; i < 21; ++i) trainer.step();  // nine in a row, one that is finite, ten in a row
  EXPECT_EQ(trainer.state().skipped, 19);
  EXPECT_MESSAGE(trainer.step(), "not finite in 10 steps in a row, up to step 21");
}

TEST(Trainer, DecaysWhatNoPatternNames) {
  Context ctx;
  const CountingData data(2, 8);
  const auto decayed = [&](const std::vector<std::string>& patterns) {
    LanguageModel model = tiny_model();
    TrainSettings settings = quick(1);
    settings.no_decay = patterns;
    return Trainer(ctx, model, data, settings).decayed_parameters();
  };
  LanguageModel model = tiny_model();
  std::int64_t all = 0;
  std::int64_t matrices_and_convolutions = 0;
  std::int64_t embedding = 0;
  model.visit([&](const Parameter& p) {
    all += p.tensor.numel();
    const bool convolution = p.name.ends_with("conv1d.weight");
    if (p.kind == ParameterKind::matrix || convolution) matrices_and_convolutions += p.tensor.numel();
    if (p.name == "backbone.embedding.weight") embedding = p.tensor.numel();
  });
  EXPECT_EQ(decayed({}), all);
  EXPECT_EQ(decayed(TrainSettings().no_decay), matrices_and_convolutions);
  EXPECT_EQ(decayed({"^backbone\\.emb.*ght$"}), all - embedding);
}

TEST(Trainer, CountsItsSteps) {
  Context ctx;
  const CountingData data(2, 8);  // 100 batches an epoch
  LanguageModel model = tiny_model();
  const auto steps = [&](std::int64_t given, double epochs, std::int64_t accumulate) {
    TrainSettings settings;
    settings.steps = given;
    settings.epochs = epochs;
    settings.accumulate = accumulate;
    return Trainer(ctx, model, data, settings).steps();
  };
  EXPECT_EQ(steps(0, 0, 1), 100);
  EXPECT_EQ(steps(0, 2.5, 1), 250);
  EXPECT_EQ(steps(0, 1, 3), 34);
  EXPECT_EQ(steps(7, 0, 3), 7);
  TrainSettings settings = quick(5);
  settings.warmup = 6;
  EXPECT_MESSAGE(Trainer(ctx, model, data, settings), "warmup is 6 steps, expected at most all 5");
  settings = quick(5);
  settings.decay = 6;
  EXPECT_MESSAGE(Trainer(ctx, model, data, settings), "decay is 6 steps, expected at most all 5");
}

TEST(Trainer, AveragesWeights) {
  Context ctx;
  const CountingData data(2, 8);
  LanguageModel model = tiny_model();
  TrainSettings settings = quick(3);
  settings.ema = 0.999;
  Trainer trainer(ctx, model, data, settings);
  std::vector<float> expected = all_weights(trainer);
  for (int n = 1; n <= 3; ++n) {
    trainer.step();
    const auto weights = all_weights(trainer);
    const double decay = (1.0 + n) / (10.0 + n);  // a young average forgets faster than ema says
    for (std::size_t i = 0; i < expected.size(); ++i)
      expected[i] = static_cast<float>(decay * expected[i] + (1.0 - decay) * weights[i]);
  }
  EXPECT_LT(largest_difference(all_weights(trainer, Trainer::Weights::average), expected), 1e-6);
  EXPECT_GT(largest_difference(all_weights(trainer), expected), 1e-4);
}

}  // namespace
}  // namespace krait
