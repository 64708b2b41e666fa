// What the fast kernels share. A block takes some channels of one group and walks a piece in tiles of kTile
// tokens. A tile lies in shared memory as (token, channel), whatever the layout of the tensors: each thread
// brings spans of elements of each tensor there, along channels or along time.
#pragma once

#include <cstdint>

#include "core/cuda/bits.cuh"
#include "core/cuda/elements.cuh"
#include "core/cuda/exponentials.cuh"
#include "ops/selective_scan/cuda/pieces.h"

namespace krait::scan {

inline constexpr int kTile = 32;
static_assert(kTile == kCheckpointSteps, "checkpoints lie between tiles");

using cuda::exp2_fast;
using cuda::kLog2E;

// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)); the polynomial is log1p(e) / e on [0, 1] to 2e-7.
__device__ __forceinline__ float softplus_fast(float x) {
  const float e = exp2_fast(-kLog2E * fabsf(x));
  float p = 0.00512610236F;
  p = fmaf(p, e, -0.0290740654F);
  p = fmaf(p, e, 0.0775160864F);
  p = fmaf(p, e, -0.136022478F);
  p = fmaf(p, e, 0.190768808F);
  p = fmaf(p, e, -0.248353988F);
  p = fmaf(p, e, 0.333181202F);
  p = fmaf(p, e, -0.499994457F);
  p = fmaf(p, e, 0.99999994F);
  return fmaf(p, e, fmaxf(x, 0.0F));  // a NaN stays one: e is NaN too
}

// Elements that a thread moves: element e lies at offset + e stride, or where positions are listed at
// offset + at[e] stride. Bit e of `valid` tells whether it is there.
struct ElementSpan {
  std::int64_t offset = 0;
  std::int64_t stride = 0;
  const std::int64_t* at = nullptr;
  unsigned valid = 0;

  __device__ __forceinline__ std::int64_t operator()(int e) const {
    return offset + (at != nullptr ? at[e] : e) * stride;
  }
};

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
  T v[kCount];
};

// What is not there reads as 0.
template <int kCount>
__device__ __forceinline__ void load_span(const void* data, DType dtype, const ElementSpan& span,
                                          cuda::Bits<kCount>& to) {
  constexpr unsigned kAll = kCount == 32 ? ~0U : (1U << kCount) - 1;
  const bool narrow = cuda::is_narrow(dtype);
  const unsigned bytes = narrow ? 2 : 4;
  const unsigned together = kCount * bytes < 16 ? kCount * bytes : 16;
  if (span.stride == 1 && span.at == nullptr && span.valid == kAll &&
      (reinterpret_cast<std::uintptr_t>(data) + span.offset * bytes) % together == 0) {
    to.load_packed(data, dtype, span.offset);
    return;
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    to.set(e, (span.valid >> e & 1U) != 0 ? cuda::load_bits(data, dtype, span(e)) : 0U, narrow);
}

// As load_packed, the other way.
template <typename T, int kCount>
__device__ __forceinline__ void store_packed(T* to, const float (&from)[kCount]) {
  constexpr int kTogether = sizeof(T) * kCount > 16 ? 16 / static_cast<int>(sizeof(T)) : kCount;
#pragma unroll
  for (int i = 0; i < kCount; i += kTogether) {
    Packed<T, kTogether> packed;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) packed.v[j] = cuda::from_float<T>(from[i + j]);
    *reinterpret_cast<Packed<T, kTogether>*>(to + i) = packed;
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void store_typed(T* data, const ElementSpan& span, const float (&from)[kCount]) {
  constexpr int kTogether = sizeof(T) * kCount > 16 ? 16 / static_cast<int>(sizeof(T)) : kCount;
  constexpr unsigned kAll = kCount == 32 ? ~0U : (1U << kCount) - 1;
  if (span.stride == 1 && span.at == nullptr && span.valid == kAll &&
      reinterpret_cast<std::uintptr_t>(data + span.offset) % (sizeof(T) * kTogether) == 0)
    return store_packed(data + span.offset, from);
#pragma unroll
  for (int e = 0; e < kCount; ++e)
    if ((span.valid >> e & 1U) != 0) data[span(e)] = cuda::from_float<T>(from[e]);
}

template <int kCount>
__device__ __forceinline__ void store_span(void* data, DType dtype, const ElementSpan& span,
                                           const float (&from)[kCount]) {
  switch (dtype) {
    case DType::bf16: return store_typed(static_cast<__nv_bfloat16*>(data), span, from);
    case DType::f16: return store_typed(static_cast<__half*>(data), span, from);
    default: return store_typed(static_cast<float*>(data), span, from);
  }
}

// Tokens [begin, begin + count) of a piece, in order of memory: slot s is token `row(s)` of the tile, and of
// a reversed piece the slots are filled from the last one down, so that a slot's row is always the same.
struct Tile32 {
  std::int64_t low = 0;  // position of slot 0
  const std::int64_t* listed = nullptr;
  int count = 0;
  bool reversed = false;

  __device__ Tile32(const Pieces& pieces, const Piece& piece, std::int64_t begin, int tokens)
      : count(tokens), reversed(piece.listed < 0 && piece.step < 0) {
    if (piece.listed >= 0)
      listed = pieces.positions + piece.listed + begin;
    else
      low = reversed ? piece.start - begin - (kTile - 1) : piece.start + begin;
  }
  __device__ __forceinline__ int row(int slot) const { return reversed ? kTile - 1 - slot : slot; }
  __device__ __forceinline__ std::int64_t position(int slot) const {
    return listed != nullptr ? listed[slot] : low + slot;
  }
  // Which of kCount slots from `slot` on hold a token.
  template <int kCount>
  __device__ __forceinline__ unsigned valid(int slot) const {
    constexpr unsigned kAll = kCount == 32 ? ~0U : (1U << kCount) - 1;
    const int empty = reversed ? kTile - count - slot : slot + kCount - count;  // at the low or the high end
    if (empty <= 0) return kAll;
    if (empty >= kCount) return 0;
    return reversed ? (kAll << empty) & kAll : kAll >> empty;
  }
  // A span along time from `slot` on, of a tensor whose element at position 0 is `base`.
  template <int kCount>
  __device__ __forceinline__ ElementSpan along_time(int slot, std::int64_t base, std::int64_t stride) const {
    const unsigned bits = valid<kCount>(slot);
    if (listed != nullptr) return {base, stride, listed + slot, bits};
    return {base + (low + slot) * stride, stride, nullptr, bits};
  }
};

// kCount floats of shared memory, aligned to their size (up to 16 bytes).
template <int kCount>
__device__ __forceinline__ void load_shared(const float* from, float (&to)[kCount]) {
  constexpr int kTogether = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kTogether) {
    const auto packed = *reinterpret_cast<const Packed<float, kTogether>*>(from + i);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) to[i + j] = packed.v[j];
  }
}

}  // namespace krait::scan
