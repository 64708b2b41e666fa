// The choice of kernels on a GPU.
#include <algorithm>

#include "krait/core/dtype.h"
#include "ops/state_update/update.h"

namespace krait::update {

bool in_pieces(const Tensor& t, int count) {
  const auto bytes = std::min<std::size_t>(16, static_cast<std::size_t>(count) * size_of(t.dtype()));
  const auto elements = static_cast<std::int64_t>(bytes / size_of(t.dtype()));
  if (t.stride(-1) != 1 || reinterpret_cast<std::uintptr_t>(t.raw()) % bytes != 0) return false;
  for (int i = 0; i + 1 < t.ndim(); ++i)
    if (t.size(i) > 1 && t.stride(i) % elements != 0) return false;
  return true;
}

bool fits_vectors(const Problem& p) {
  constexpr std::int64_t kWarp = 32;
  const auto states = static_cast<std::int64_t>(16 / size_of(p.state.dtype()));
  const std::int64_t lanes = p.d_state / states;
  if (p.d_state % states != 0 || lanes < 1 || lanes > kWarp || (lanes & (lanes - 1)) != 0) return false;
  if (!in_pieces(p.state, static_cast<int>(states))) return false;
  return p.A.stride(2) == 0 || (p.A.dtype() == DType::f32 && in_pieces(p.A, static_cast<int>(states)));
}

StreamPlan choose_stream_plan(const StreamSizes& s, int multiprocessors) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  const auto lanes = static_cast<int>(s.d_state * static_cast<std::int64_t>(size_of(s.state)) / 16);
  const bool few = lanes == 2 || lanes == 4;
  const bool many = lanes == 8 || lanes == 16 || lanes == 32;
  if (s.tokens != 1 || !(s.decay_per_state ? few : many && s.one_step)) return {};
  const std::int64_t tile = kStreamThreads / lanes * stream_channels(s.decay_per_state);
  StreamPlan plan{.lanes = lanes, .tiles = (s.headdim + tile - 1) / tile};
  const std::int64_t units = plan.tiles * s.heads;
  plan.items = units * s.batch;
  // With fewer tiles nothing is on its way while a block works: spread them instead.
  if (plan.items < 2 * std::int64_t{multiprocessors} || plan.items >= kMost) return {};
  const std::int64_t resident =
      std::int64_t{multiprocessors} * stream_blocks(size_of(s.state), s.decay_per_state);
  if (!s.decay_per_state) {
    plan.blocks = std::min(plan.items, resident);
    return plan;
  }
  // Blocks keep their channels, and with them A, and share out the entries of the batch in equal parts.
  const std::int64_t at_once = resident / units;
  if (at_once == 0) return {};
  const std::int64_t rounds = (s.batch + at_once - 1) / at_once;
  plan.blocks = units * ((s.batch + rounds - 1) / rounds);
  return plan;
}

StreamPlan choose_stream_plan(const Problem& p, int multiprocessors) {
  return choose_stream_plan(
      {.batch = p.batch(),
       .tokens = p.tokens,
       .heads = p.heads,
       .headdim = p.headdim,
       .d_state = p.d_state,
       .state = p.state.dtype(),
       .decay_per_state = p.A.stride(2) != 0,
       .one_step = p.dt.stride(3) == 0 && (!p.dt_bias || p.dt_bias.stride(1) == 0) && p.A.stride(1) == 0},
      multiprocessors);
}

}  // namespace krait::update
