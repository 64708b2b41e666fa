// The SIMD path: lanes over the states of a channel, four channels at a time, whose sums over the states
// are reduced together. A task is a block of channels of one head and one batch entry; what each of its
// channels needs once (dt, its decay, the gate) is computed for the whole block with lanes over channels.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/state_update/cpu/update.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/state_update/update.h"

#ifndef KRAIT_OPS_STATE_UPDATE_CPU_UPDATE_ONCE
#define KRAIT_OPS_STATE_UPDATE_CPU_UPDATE_ONCE
namespace krait::update {

inline constexpr std::int64_t kBlock = 64;    // channels of a task: a multiple of every vector
inline constexpr std::int64_t kTogether = 4;  // channels whose states are updated side by side
inline constexpr std::int64_t kWidest = 16;   // lanes of the widest vector

struct Task {
  std::int64_t batch = 0;
  std::int64_t head = 0;
  std::int64_t first = 0;  // channel of the head
  std::int64_t channels = 0;
};

// States of a channel, padded to whole vectors.
inline std::int64_t padded(std::int64_t d_state) { return (d_state + kWidest - 1) / kWidest * kWidest; }

// Floats of a worker's memory: B, C, and four rows each of the state and of A.
inline std::int64_t scratch_floats(std::int64_t d_state) { return (2 + 2 * kTogether) * padded(d_state); }

}  // namespace krait::update
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::update::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = krait::HWY_NAMESPACE;

using Tag = hn::CappedTag<float, 16>;
using V = hn::Vec<Tag>;

// Four rows of states, and what each of them is multiplied with.
template <typename T>
struct Rows {
  T* state;
  std::int64_t state_stride;
  const float* A;  // log2(e) is in `step`; absent where each row has one decay
  std::int64_t a_stride;
  const float* step;   // log2(e) dt, or the decay
  const float* input;  // dt x
};

#if HWY_TARGET == HWY_SCALAR
HWY_INLINE void store_sums(const V (&rows)[kTogether], float* to) {
  for (std::int64_t i = 0; i < kTogether; ++i) to[i] = hn::GetLane(rows[i]);
}
#else
template <class D>
HWY_INLINE void store_folded(D d, hn::Vec<D> v, float* to) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    hn::StoreU(v, d, to);
  } else {
    const hn::Half<D> half;
    store_folded(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)), to);
  }
}

// to[i] = the sum of the lanes of rows[i].
HWY_INLINE void store_sums(const V (&rows)[kTogether], float* to) {
  const Tag d;
  const hn::Repartition<std::uint64_t, Tag> d64;
  // Inside each block of four lanes: pairs of two rows, then all four rows in order.
  const auto add_pairs = [&](V a, V b) HWY_ATTR {
    return hn::BitCast(d64, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto low = add_pairs(rows[0], rows[1]);
  const auto high = add_pairs(rows[2], rows[3]);
  const V sums = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, low, high)),
                         hn::BitCast(d, hn::InterleaveUpper(d64, low, high)));
  store_folded(d, sums, to);
}
#endif

// Advances four rows by one token: state = decay state + dt x B. Writes the sums of state C to `sums`.
// `count` is a whole number of vectors.
template <bool kOneDecay, typename T>
HWY_INLINE void advance_rows(const Rows<T>& rows, const float* HWY_RESTRICT B, const float* HWY_RESTRICT C,
                             std::int64_t count, float* HWY_RESTRICT sums) {
  const Tag d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  V step[kTogether];
  V input[kTogether];
  V sum[kTogether];
  for (int i = 0; i < kTogether; ++i) {
    step[i] = hn::Set(d, rows.step[i]);
    input[i] = hn::Set(d, rows.input[i]);
    sum[i] = hn::Zero(d);
  }
  for (std::int64_t n = 0; n < count; n += lanes) {
    V decay[kTogether];
    for (int i = 0; i < kTogether; ++i) {
      if constexpr (kOneDecay)
        decay[i] = step[i];
      else
        decay[i] = hn::Mul(step[i], hn::LoadU(d, rows.A + i * rows.a_stride + n));
    }
    if constexpr (!kOneDecay) simd::exp2_flush(d, decay);
    const V b = hn::LoadU(d, B + n);
    const V c = hn::LoadU(d, C + n);
    for (int i = 0; i < kTogether; ++i) {
      T* at = rows.state + i * rows.state_stride + n;
      const V state = hn::MulAdd(decay[i], simd::load_f32(d, at), hn::Mul(input[i], b));
      simd::store_f32(d, state, at);
      sum[i] = hn::MulAdd(state, c, sum[i]);
    }
  }
  store_sums(sum, sums);
}

class Worker {
 public:
  Worker(const Problem& problem, float* scratch)
      : p_(problem),
        width_(padded(problem.d_state)),
        one_decay_(problem.A.stride(2) == 0 || problem.d_state <= 1),
        B_(scratch),
        C_(B_ + width_),
        state_tile_(C_ + width_),
        a_tile_(state_tile_ + kTogether * width_) {
    std::fill_n(scratch, scratch_floats(p_.d_state), 0.0F);  // the padding of each row stays 0
  }

  void run(const Task& task) {
    task_ = task;
    row_ = p_.rows[static_cast<std::size_t>(task.batch)];
    for (std::int64_t t = 0; t < p_.tokens; ++t) {
      if (row_ < 0) {
        std::fill_n(y_, kBlock, 0.0F);
      } else {
        prepare(t);
        stage_factor(p_.B, t, B_);
        stage_factor(p_.C, t, C_);
        advance();
        finish(t);
      }
      simd::store_tile(y_, 0, p_.out.dtype(), p_.out.raw(), sequence_offset(p_.out, t), 0, p_.out.stride(3),
                       1, task_.channels);
    }
  }

 private:
  static constexpr float kLog2E = 1.44269504F;

  [[nodiscard]] std::int64_t sequence_offset(const Tensor& t, std::int64_t token) const {
    return task_.batch * t.stride(0) + token * t.stride(1) + task_.head * t.stride(2) +
           task_.first * t.stride(3);
  }

  // The task's channels of a tensor (B, T, H, P) at one token.
  void stage_sequence(const Tensor& t, std::int64_t token, float* to) const {
    simd::load_tile(t.dtype(), t.raw(), sequence_offset(t, token), 0, t.stride(3), 1, task_.channels, to, 0);
  }

  // The task's channels of a tensor (H, P).
  void stage_channels(const Tensor& t, float* to) const {
    simd::load_tile(t.dtype(), t.raw(), task_.head * t.stride(0) + task_.first * t.stride(1), 0, t.stride(1),
                    1, task_.channels, to, 0);
  }

  void stage_factor(const Tensor& t, std::int64_t token, float* to) const {
    simd::load_tile(t.dtype(), t.raw(),
                    task_.batch * t.stride(0) + token * t.stride(1) + p_.group(task_.head) * t.stride(2), 0,
                    t.stride(3), 1, p_.d_state, to, 0);
  }

  // Per channel: dt (times log2(e), or as the decay itself), dt x, and D x.
  void prepare(std::int64_t token) {
    const Tag d;
    stage_sequence(p_.dt, token, step_);
    stage_sequence(p_.x, token, input_);
    if (p_.dt_bias) stage_channels(p_.dt_bias, bias_);
    if (p_.D) stage_channels(p_.D, skip_);
    if (one_decay_ && p_.d_state > 0)
      simd::load_tile(p_.A.dtype(), p_.A.raw(), task_.head * p_.A.stride(0) + task_.first * p_.A.stride(1), 0,
                      p_.A.stride(1), 1, task_.channels, a_, 0);
    const V low = hn::Set(d, p_.dt_limit.low);
    const V high = hn::Set(d, p_.dt_limit.high);
    for (std::int64_t i = 0; i < task_.channels; i += lanes()) {
      V dt = hn::Load(d, step_ + i);
      if (p_.dt_bias) dt = hn::Add(dt, hn::Load(d, bias_ + i));
      if (p_.dt_softplus) dt = simd::softplus(d, dt);
      dt = hn::IfThenElse(hn::Lt(dt, low), low, dt);  // a NaN stays
      dt = hn::IfThenElse(hn::Gt(dt, high), high, dt);
      const V x = hn::Load(d, input_ + i);
      hn::Store(hn::Mul(dt, x), d, input_ + i);
      hn::Store(p_.D ? hn::Mul(hn::Load(d, skip_ + i), x) : hn::Zero(d), d, skip_ + i);
      const V step = hn::Mul(dt, hn::Set(d, kLog2E));
      hn::Store(one_decay_ ? simd::exp2_flush(d, hn::Mul(step, hn::Load(d, a_ + i))) : step, d, step_ + i);
    }
  }

  void advance() {
    const Tensor& state = p_.state;
    const std::int64_t first =
        row_ * state.stride(0) + task_.head * state.stride(1) + task_.first * state.stride(2);
    const bool whole = p_.d_state % lanes() == 0;
    const bool direct = state.stride(3) == 1 && whole;
    const bool a_direct = p_.A.dtype() == DType::f32 && p_.A.stride(2) == 1 && whole;
    for (std::int64_t i = 0; i < task_.channels; i += kTogether) {
      const std::int64_t count = std::min(kTogether, task_.channels - i);
      Rows<float> rows = {state_tile_, width_, a_tile_, width_, step_ + i, input_ + i};
      if (!one_decay_) {
        const std::int64_t at = task_.head * p_.A.stride(0) + (task_.first + i) * p_.A.stride(1);
        if (a_direct && count == kTogether) {
          rows.A = static_cast<const float*>(p_.A.raw()) + at;
          rows.a_stride = p_.A.stride(1);
        } else {
          simd::load_tile(p_.A.dtype(), p_.A.raw(), at, p_.A.stride(1), p_.A.stride(2), count, p_.d_state,
                          a_tile_, width_);
        }
      }
      const std::int64_t at = first + i * state.stride(2);
      if (direct && count == kTogether) {
        advance_in_place(rows, at, i);
        continue;
      }
      simd::load_tile(state.dtype(), state.raw(), at, state.stride(2), state.stride(3), count, p_.d_state,
                      state_tile_, width_);
      advance_as(rows, i);
      simd::store_tile(state_tile_, width_, state.dtype(), state.raw(), at, state.stride(2), state.stride(3),
                       count, p_.d_state);
    }
  }

  void advance_in_place(const Rows<float>& rows, std::int64_t at, std::int64_t channel) {
    const auto with = [&](auto* data) {
      using T = std::remove_pointer_t<decltype(data)>;
      advance_as(Rows<T>{data + at, p_.state.stride(2), rows.A, rows.a_stride, rows.step, rows.input},
                 channel);
    };
    switch (p_.state.dtype()) {
      case DType::bf16: return with(static_cast<bf16*>(p_.state.raw()));
      case DType::f16: return with(static_cast<f16*>(p_.state.raw()));
      default: return with(static_cast<float*>(p_.state.raw()));
    }
  }

  template <typename T>
  void advance_as(const Rows<T>& rows, std::int64_t channel) {
    const std::int64_t count = (p_.d_state + lanes() - 1) / lanes() * lanes();
    if (one_decay_)
      advance_rows<true>(rows, B_, C_, count, y_ + channel);
    else
      advance_rows<false>(rows, B_, C_, count, y_ + channel);
  }

  void finish(std::int64_t token) {
    const Tag d;
    if (p_.z) stage_sequence(p_.z, token, bias_);
    for (std::int64_t i = 0; i < task_.channels; i += lanes()) {
      V y = hn::Add(hn::Load(d, y_ + i), hn::Load(d, skip_ + i));
      if (p_.z) y = hn::Mul(y, simd::silu(d, hn::Load(d, bias_ + i)));
      hn::Store(y, d, y_ + i);
    }
  }

  static std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(Tag())); }

  const Problem& p_;
  std::int64_t width_;  // of a padded row of states
  bool one_decay_;      // A does not depend on the state
  float* B_;
  float* C_;
  float* state_tile_;
  float* a_tile_;
  Task task_;
  std::int64_t row_ = -1;
  HWY_ALIGN float step_[kBlock] = {};
  HWY_ALIGN float input_[kBlock] = {};
  HWY_ALIGN float bias_[kBlock] = {};  // later z
  HWY_ALIGN float skip_[kBlock] = {};
  HWY_ALIGN float a_[kBlock] = {};
  HWY_ALIGN float y_[kBlock] = {};
};

// Tasks [begin, end), counted over blocks of channels, then heads, then batch entries.
void run_tasks(const Problem& p, float* scratch, std::int64_t begin, std::int64_t end) {
  Worker worker(p, scratch);
  const std::int64_t blocks = (p.headdim + kBlock - 1) / kBlock;
  for (std::int64_t index = begin; index < end; ++index) {
    const std::int64_t first = index % blocks * kBlock;
    worker.run({.batch = index / blocks / p.heads,
                .head = index / blocks % p.heads,
                .first = first,
                .channels = std::min(kBlock, p.headdim - first)});
  }
}

}  // namespace
}  // namespace krait::update::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::update {
namespace {
HWY_EXPORT(run_tasks);
}  // namespace

void run_simd(Context& ctx, const Problem& p) {
  const std::int64_t tasks = p.batch() * p.heads * ((p.headdim + kBlock - 1) / kBlock);
  if (tasks == 0) return;
  const std::int64_t elements = p.batch() * p.tokens * p.heads * p.headdim * (p.d_state + 8);
  const std::int64_t workers =
      std::min<std::int64_t>(choose_threads(elements, p.A.stride(2) != 0, ctx.threads()), tasks);
  const std::int64_t floats = scratch_floats(p.d_state);
  const Tensor scratch = ctx.empty({workers, floats});
  parallel_for(ctx, workers, 1, [&](std::int64_t begin, std::int64_t end) {
    HWY_DYNAMIC_DISPATCH(run_tasks)
    (p, scratch.data<float>() + begin * floats, tasks * begin / workers, tasks * end / workers);
  });
}

}  // namespace krait::update
#endif  // HWY_ONCE
