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

namespace {

// x, z or out: channels side by side.
bool side_by_side(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1; }

// B or C: read in whole pieces beside the states, 16 bytes where there are as many.
bool in_whole_pieces(const Tensor& t, DType state) {
  return in_pieces(t, static_cast<int>(16 / size_of(state)));
}

}  // namespace

bool fits_stream(const Problem& p) {
  const DType dtype = p.x.dtype();
  for (const Tensor* t : {&p.dt, &p.B, &p.C, &p.z, &p.out})
    if (*t && t->dtype() != dtype) return false;
  if (!side_by_side(p.x) || !side_by_side(p.out) || (p.z && !side_by_side(p.z))) return false;
  if (!in_whole_pieces(p.B, p.state.dtype()) || !in_whole_pieces(p.C, p.state.dtype())) return false;
  if (p.state.stride(3) != 1 || (p.headdim > 1 && p.state.stride(2) != p.d_state)) return false;
  if (!fits_vectors(p)) return false;
  if (p.A.stride(2) != 0) return side_by_side(p.dt);
  // All channels of a head share dt, its bias and A.
  return p.dt.stride(3) == 0 && (!p.dt_bias || p.dt_bias.stride(1) == 0) && p.A.stride(1) == 0;
}

StreamPlan choose_stream_plan(const StreamSizes& s, int multiprocessors) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  const bool per_state = s.decay_per_state;
  if (s.tokens != 1 || !(per_state ? s.d_state == 16 : s.d_state == 64 || s.d_state == 128)) return {};
  const std::int64_t lanes = s.d_state * static_cast<std::int64_t>(size_of(s.state)) / 16;
  const std::int64_t tile = kStreamThreads / lanes * stream_channels(per_state);
  StreamPlan plan{.tiles = (s.headdim + tile - 1) / tile};
  const std::int64_t units = plan.tiles * s.heads;
  plan.items = units * s.batch;
  // With fewer tiles nothing is on its way while a block works: they are spread instead. Places within an
  // entry are counted in 32 bits.
  if (plan.items < 2 * std::int64_t{multiprocessors} || plan.items >= kMost || s.headdim * s.d_state >= kMost)
    return {};
  const std::int64_t resident = std::int64_t{multiprocessors} * stream_blocks(size_of(s.state), per_state);
  if (!per_state) {
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
  if (!fits_stream(p)) return {};
  return choose_stream_plan({.batch = p.batch(),
                             .tokens = p.tokens,
                             .heads = p.heads,
                             .headdim = p.headdim,
                             .d_state = p.d_state,
                             .state = p.state.dtype(),
                             .decay_per_state = p.A.stride(2) != 0},
                            multiprocessors);
}

}  // namespace krait::update
