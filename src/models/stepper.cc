#include "krait/models/stepper.h"

#include "krait/core/error.h"

namespace krait {

std::int64_t recorded_size(std::int64_t n) {
  const auto up_to = [&](std::int64_t step) { return (n + step - 1) / step * step; };
  if (n <= 4) return n;
  if (n <= 8) return 8;
  return n <= 128 ? up_to(16) : up_to(64);
}

bool Stepper::steps_ahead() const { return ctx_.on_gpu() && model_.steps_can_be_recorded(); }

const Tensor& Stepper::step(std::span<const std::int64_t> ids, std::span<State* const> states) {
  require(ids.size() == states.size(), "a step of ", ids.size(), " ids for ", states.size(), " states");
  std::vector<Sequence> sequences;
  for (std::size_t i = 0; i < ids.size(); ++i)
    sequences.push_back({.ids = ids.subspan(i, 1), .state = states[i]});
  if (!steps_ahead() || ids.empty()) {
    logits_ = model_.logits(ctx_, sequences);
    return logits_;
  }
  model_.check(sequences);
  return launch(Tensor::from(std::vector<std::int64_t>(ids.begin(), ids.end())), states);
}

const Tensor& Stepper::step(const Tensor& ids, std::span<State* const> states) {
  require(steps_ahead(),
          "a step of ids that are known on the device alone needs a GPU and a model without attention");
  require(ids.shape() == Dims{static_cast<std::int64_t>(states.size())} && ids.dtype() == DType::i64,
          "a step of ids of shape ", ids.shape(), " and dtype ", ids.dtype(), " for ", states.size(),
          " states");
  std::vector<Sequence> sequences;
  constexpr std::int64_t kAny = 0;  // in place of what the host does not know
  for (State* state : states) sequences.push_back({.ids = std::span(&kAny, 1), .state = state});
  model_.check(sequences);
  return launch(ids, states);
}

// Padding slots have any token.
const Tensor& Stepper::launch(const Tensor& ids, std::span<State* const> states) {
  ctx_.check_cancelled();
  const std::shared_ptr<StatePool>& pool = states[0]->pool();
  const auto n = static_cast<std::int64_t>(states.size());
  const std::int64_t size = recorded_size(n);
  Recorded& r = recorded_[size];
  const bool first = !r.ids;
  if (first) {
    r.ids = ctx_.zeros({size}, DType::i64);
    r.rows = ctx_.empty({size}, DType::i64);
    if (!largest_ || largest_.size(0) < size)
      largest_ = ctx_.empty({size, model_.config().padded_vocab_size()});
    r.logits = largest_.slice(0, 0, size);
  }
  std::vector<std::int64_t> rows;
  for (const State* state : states) rows.push_back(state->row());
  rows.resize(static_cast<std::size_t>(size), -1);
  ctx_.copy(ids, r.ids.slice(0, 0, n));
  if (rows != r.known_rows) {
    ctx_.copy(Tensor::from(rows), r.rows);
    r.known_rows = rows;
  }
  // A pool that has grown since has its states elsewhere.
  if (pool->address() != r.pool_memory) r.launch = nullptr;
  if (r.launch) {
    r.launch();
  } else if (first || pool->address() != r.pool_memory || ctx_.profiling()) {
    run(r, pool);
  } else {
    r.launch = ctx_.record([&] { run(r, pool); });
    r.launch();
  }
  r.pool_memory = pool->address();
  for (State* state : states) pool->set_position(state->row(), state->position() + 1);
  logits_ = r.logits.slice(0, 0, n);
  return logits_;
}

void Stepper::run(const Recorded& r, const std::shared_ptr<StatePool>& pool) {
  model_.step(ctx_, r.ids, Batch::of_steps(pool, r.rows), r.logits);
}

}  // namespace krait
