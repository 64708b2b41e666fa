// What the kernels of state_update share.
#pragma once

#include <cstdint>

#include "core/cuda/bits.cuh"
#include "core/cuda/elements.cuh"
#include "core/cuda/exponentials.cuh"
#include "ops/state_update/update.h"

namespace krait::update {

using cuda::AnyView;
using cuda::IndexView;

using cuda::exp2_fast;
using cuda::kLog2E;

// The problem as kernels see it.
struct Operands {
  explicit Operands(const Problem& p)
      : state(p.state),
        x(p.x),
        dt(p.dt),
        A(p.A),
        B(p.B),
        C(p.C),
        D(p.D),
        z(p.z),
        dt_bias(p.dt_bias),
        out(p.out),
        rows(p.indices),
        available(p.state.size(0)),
        batch(p.batch()),
        tokens(p.tokens),
        heads(p.heads),
        headdim(p.headdim),
        d_state(p.d_state),
        heads_per_group(p.heads / p.groups),
        low(p.dt_limit.low),
        high(p.dt_limit.high),
        softplus(p.dt_softplus) {}

  AnyView<4> state;
  AnyView<4> x;
  AnyView<4> dt;
  AnyView<3> A;
  AnyView<4> B;
  AnyView<4> C;
  AnyView<2> D;
  AnyView<4> z;
  AnyView<2> dt_bias;
  AnyView<4> out;
  IndexView rows;
  std::int64_t available;
  std::int64_t batch;
  std::int64_t tokens;
  std::int64_t heads;
  std::int64_t headdim;
  std::int64_t d_state;
  std::int64_t heads_per_group;
  float low;
  float high;
  bool softplus;

  // The row of state of batch entry b; -1: a padding slot.
  __device__ std::int64_t row_of(std::int64_t b) const {
    const std::int64_t row = rows ? rows(b) : b;
    return row < available ? row : -1;
  }
  __device__ float step_of(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t p) const {
    float step = dt.load(b, t, h, p);
    if (dt_bias) step += dt_bias.load(h, p);
    return limited(step);
  }
  __device__ __forceinline__ float limited(float step) const {
    if (softplus) step = cuda::softplus(step);
    // Not fminf and fmaxf, which lose a NaN.
    return step < low ? low : step > high ? high : step;
  }
  // Whole output of a channel whose states have given `y`.
  __device__ void finish(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t p, float input,
                         float y) const {
    if (D) y = fmaf(D.load(h, p), input, y);
    if (z) y *= cuda::silu(z.load(b, t, h, p));
    out.store(y, b, t, h, p);
  }
};

// The recurrence; written out, so that all kernels give the same bits.
__device__ __forceinline__ float advance(float decay, float state, float input, float B) {
  return fmaf(decay, state, input * B);
}

// Memory of kCount elements read and written at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
  T v[kCount];
};

// kCount elements from `at` on; `packed` where they lie side by side, aligned to their size.
template <int kCount>
__device__ __forceinline__ cuda::Bits<kCount> load_factor(const AnyView<4>& view, std::int64_t at,
                                                          bool packed) {
  cuda::Bits<kCount> bits;
  if (packed) {
    bits.load_packed(view.data, view.dtype, at);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      bits.set(i, cuda::load_bits(view.data, view.dtype, at + i * view.stride[3]),
               cuda::is_narrow(view.dtype));
  }
  return bits;
}

// An element of an optional tensor: 0 where that is absent.
template <typename View, typename... Index>
__device__ __forceinline__ std::uint32_t bits_of(const View& view, Index... index) {
  return view ? cuda::load_bits(view.data, view.dtype, view.offset(index...)) : 0U;
}

}  // namespace krait::update
