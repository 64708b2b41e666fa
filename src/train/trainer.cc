#include "krait/train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include "core/crc32.h"
#include "krait/core/error.h"
#include "train/fixed_batches.h"
#include "train/optimizer_state.h"

namespace krait {
namespace {

constexpr std::int64_t kMostSkippedInARow = 10;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::int64_t steps_of(const TrainSettings& settings, const Dataset& data) {
  if (settings.steps > 0) return settings.steps;
  const double epochs = settings.epochs > 0.0 ? settings.epochs : 1.0;
  const double batches = epochs * static_cast<double>(data.batches_per_epoch());
  const double steps = std::ceil(batches / static_cast<double>(settings.accumulate));
  require(steps < 1e15, "epochs is ", epochs, ": ", steps, " steps, expected fewer than 1e15");
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(steps));
}

ScheduleArgs schedule_of(const TrainSettings& settings, std::int64_t steps) {
  require(settings.warmup <= steps, "warmup is ", settings.warmup, " steps, expected at most all ", steps);
  require(settings.decay <= steps, "decay is ", settings.decay, " steps, expected at most all ", steps);
  constexpr std::int64_t kDecayShare = 5;
  return {.schedule = settings.schedule,
          .steps = steps,
          .warmup = settings.warmup,
          .decay = settings.decay > 0 ? settings.decay : (steps + kDecayShare - 1) / kDecayShare,
          .lr = settings.lr,
          .min_lr = settings.min_lr};
}

// CRC-32 over batches at even distances in an epoch, as many as a moment allows, or all of them: other data
// of as many tokens have another one.
std::int64_t checksum_of(const Dataset& data) {
  constexpr std::int64_t kTokens = std::int64_t{1} << 18;
  const std::int64_t batches = data.batches_per_epoch();
  const std::int64_t count =
      std::clamp<std::int64_t>(kTokens / (data.batch_size() * data.seq_len()), 1, batches);
  std::uint32_t crc = 0;
  TrainingBatch batch;
  for (std::int64_t i = 0; i < count; ++i) {
    data.fill(i * batches / count, batch);
    crc = crc32(std::as_bytes(batch.inputs.span<std::int64_t>()), crc);
    crc = crc32(std::as_bytes(batch.targets.span<std::int64_t>()), crc);
  }
  return crc;
}

// For messages: "books.txt and 2 more".
std::string name_of(const std::vector<std::string>& files) {
  if (files.empty()) return "the data set";
  return files.size() == 1 ? files[0] : concat(files[0], " and ", files.size() - 1, " more");
}

// States that rows of batches hand on to the next batch.
class CarriedStates {
 public:
  CarriedStates(const LanguageModel& model, const TrainSettings& settings, std::int64_t rows) {
    if (!settings.carry_state) return;
    require(model.config().attn_layer_idx.empty() && model.config().format != Format::gpt_neox,
            "carry_state is on, which models with attention layers cannot do");
    pool_ = model.make_pool(rows);
    rows_ = rows;
    // The only user of the pool: rows come in order.
    for (std::int64_t row = 0; row < rows; ++row)
      require(pool_->acquire() == row, "carry_state: rows of the pool are not in order");
  }

  void prepare(const Dataset& data, std::int64_t index, TrainingBatch& batch) const {
    if (!pool_) return;
    for (std::int64_t row = 0; row < rows_; ++row)
      if (data.restarts(index, row)) pool_->reset(row);
    batch.states = pool_;
  }
  void reset() const {
    for (std::int64_t row = 0; row < rows_; ++row) pool_->reset(row);
  }

  // As they are now: the tensors are those of the pool.
  [[nodiscard]] io::TensorMap tensors() const {
    io::TensorMap map;
    for (int layer = 0; pool_ && layer < pool_->n_layer(); ++layer) {
      const auto put = [&](const char* name, const Tensor& tensor) {
        if (tensor) map.emplace(concat("state.", layer, name), tensor.slice(0, 0, rows_));
      };
      put(".conv", pool_->conv(layer));
      put(".ssm", pool_->ssm(layer));
    }
    return map;
  }
  void restore(const io::TensorMap& from, const std::string& name) const {
    for (const auto& [key, tensor] : tensors()) {
      const auto found = from.find(key);
      require(found != from.end() && found->second.shape() == tensor.shape(), name, ": tensor ", key,
              " is missing or of another shape, expected ", tensor.shape());
      pool_->memory().copy(found->second, tensor);
    }
  }

 private:
  std::shared_ptr<StatePool> pool_;
  std::int64_t rows_ = 0;
};

}  // namespace

DatasetOptions dataset_options(const TrainSettings& settings, const ModelConfig& config) {
  // A file of fixed batches, (steps, batch, length + 1), says itself how large they are.
  const bool fixed = settings.data.size() == 1 && dataset::holds_fixed_batches(settings.data[0]);
  constexpr std::int64_t kLength = 512;
  constexpr std::int64_t kBatch = 8;
  return {.seq_len = settings.seq_len == 0 && !fixed ? kLength : settings.seq_len,
          .batch_size = settings.batch_size == 0 && !fixed ? kBatch : settings.batch_size,
          .seed = static_cast<std::uint64_t>(settings.seed),
          .vocab_size = config.vocab_size,
          .document_boundaries = !settings.ignore_boundaries,
          .carry = settings.carry_state};
}

struct Trainer::Impl {
  Context& ctx;
  LanguageModel& model;
  const Dataset& data;
  TrainSettings settings;
  ScheduleArgs schedule;
  OptimizerState optimizer;
  CarriedStates carried;
  Tape tape;
  TrainerState state;
  Clock::time_point begin = Clock::now();
  double seconds_before = 0.0;  // of earlier processes
  std::vector<TrainingBatch> batches;

  Impl(Context& context, LanguageModel& m, const Dataset& d, const TrainSettings& s)
      : ctx(context),
        model(m),
        data(d),
        settings(s),
        schedule(schedule_of(s, steps_of(s, d))),
        optimizer(context, m, s),
        carried(m, s, d.batch_size()),
        tape({.recompute = s.recompute, .dropout = s.dropout, .seed = static_cast<std::uint64_t>(s.seed)}),
        batches(static_cast<std::size_t>(s.accumulate)) {
    state.seed = s.seed;
    state.data_tokens = d.tokens();
    state.data_checksum = checksum_of(d);
  }

  // Targets of all batches of the step, which are filled.
  std::int64_t fill_batches() {
    std::int64_t targets = 0;
    for (std::size_t i = 0; i < batches.size(); ++i) {
      data.fill(state.batches + static_cast<std::int64_t>(i), batches[i]);
      for (const std::int64_t target : batches[i].targets.span<std::int64_t>())
        targets += target == TrainingBatch::kNoLoss ? 0 : 1;
    }
    return targets;
  }
};

Trainer::Trainer(Context& ctx, LanguageModel& model, const Dataset& data, const TrainSettings& settings)
    : impl_(std::make_unique<Impl>(ctx, model, data, settings)) {}
Trainer::~Trainer() = default;

std::int64_t Trainer::steps() const { return impl_->schedule.steps; }
std::int64_t Trainer::step_number() const { return impl_->state.step; }
std::int64_t Trainer::parameters() const { return impl_->optimizer.parameters(); }
std::int64_t Trainer::decayed_parameters() const { return impl_->optimizer.decayed_parameters(); }
const Tape& Trainer::tape() const { return impl_->tape; }

StepReport Trainer::step() {
  Impl& t = *impl_;
  TrainerState& state = t.state;
  require(state.skipped_in_a_row < kMostSkippedInARow, "loss or gradient norm was not finite in ",
          state.skipped_in_a_row, " steps in a row, up to step ", state.step,
          ": training stops (a lower lr or a longer warmup may help)");
  const Clock::time_point begin = Clock::now();
  StepReport report{.step = state.step + 1, .lr = learning_rate(t.schedule, state.step)};

  const std::int64_t targets = t.fill_batches();
  const double scale = 1.0 / static_cast<double>(std::max<std::int64_t>(targets, 1));
  t.model.zero_gradients(t.ctx);
  double loss = 0.0;
  for (TrainingBatch& batch : t.batches) {
    t.carried.prepare(t.data, state.batches, batch);
    t.tape.begin(static_cast<std::uint64_t>(state.batches));
    const CrossEntropyResult result = t.model.accumulate_gradients(t.ctx, batch, t.tape, scale);
    loss += result.mean * static_cast<double>(result.count);
    ++state.batches;
  }
  report.loss = loss * scale;
  report.grad_norm = t.optimizer.gradient_norm();

  report.was_skipped = !std::isfinite(report.loss) || !std::isfinite(report.grad_norm);
  if (report.was_skipped) {
    ++state.skipped;
    ++state.skipped_in_a_row;
    t.carried.reset();
  } else {
    state.skipped_in_a_row = 0;
    constexpr double kTiny = 1e-6;  // a norm of 0 divides nothing
    const double clip = t.settings.clip;
    const double factor = clip > 0.0 ? std::min(1.0, clip / (report.grad_norm + kTiny)) : 1.0;
    t.optimizer.update(++state.updates, report.lr, factor);
    state.tokens += targets;
  }
  ++state.step;
  state.seconds = t.seconds_before + seconds_since(t.begin);
  report.tokens = state.tokens;
  report.seconds = state.seconds;
  report.skipped = state.skipped;
  report.tokens_per_second = static_cast<double>(targets) / seconds_since(begin);
  return report;
}

void Trainer::with_weights(Weights which, const std::function<void()>& body) {
  const WeightsForEvaluation weights(impl_->optimizer, which == Weights::last
                                                           ? WeightsForEvaluation::Which::master
                                                           : WeightsForEvaluation::Which::average);
  body();
}

io::TensorMap Trainer::weights(Weights which) const {
  return which == Weights::last ? impl_->optimizer.weights() : impl_->optimizer.average();
}

Trainer::Snapshot Trainer::snapshot() const {
  Snapshot snapshot{.model = impl_->optimizer.weights(), .optimizer = impl_->optimizer.moments()};
  for (const auto& [name, tensor] : impl_->carried.tensors())
    snapshot.optimizer.emplace(name, impl_->ctx.to_host(tensor));
  return snapshot;
}

TrainerState Trainer::state() const {
  TrainerState state = impl_->state;
  state.seconds = impl_->seconds_before + seconds_since(impl_->begin);
  return state;
}

void Trainer::restore(const TrainerState& state, const Snapshot& snapshot, const std::string& name) {
  Impl& t = *impl_;
  require(state.seed == t.state.seed, name, ": was made with seed ", state.seed, ", now it is ",
          t.state.seed);
  require(state.data_tokens == t.state.data_tokens, name, ": was made with data of ", state.data_tokens,
          " tokens, now there are ", t.state.data_tokens, " in ", name_of(t.settings.data));
  require(state.data_checksum == t.state.data_checksum, name,
          ": was made with other data: ", name_of(t.settings.data),
          " has as many tokens as before, but not the same");
  require(state.batches == state.step * t.settings.accumulate && state.updates >= 0 && state.skipped >= 0 &&
              state.updates + state.skipped == state.step,
          name, ": its counts do not fit together: ", state.step, " steps of ", t.settings.accumulate,
          " batches, ", state.batches, " batches, ", state.updates, " updates, ", state.skipped, " skipped");
  t.optimizer.load(snapshot.model, snapshot.optimizer, name);
  t.carried.restore(snapshot.optimizer, name);
  t.state = state;
  t.seconds_before = state.seconds;
  t.begin = Clock::now();
}

}  // namespace krait
