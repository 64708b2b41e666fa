// Channels side by side in memory: the kernels for channel-last layouts.
#pragma once

#include "ops/causal_conv1d/cuda/runs.cuh"

namespace krait::conv_detail {

// A tensor (B, D, L) with channels side by side.
struct Rows {
  void* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t token_stride = 0;

  Rows() = default;
  explicit Rows(const Tensor& t) {
    if (t) *this = Rows{t.raw(), t.stride(0), t.stride(2)};
  }
  Rows(void* d, std::int64_t row, std::int64_t token) : data(d), row_stride(row), token_stride(token) {}

  template <typename T>
  __device__ __forceinline__ T* at(const Walk& walk, std::int64_t token, std::int64_t channel) const {
    return static_cast<T*>(data) + walk.row * row_stride + walk.position(token) * token_stride + channel;
  }
  // From one token of a piece to the next; choose_kernel sees to it that it is that small.
  __device__ __forceinline__ int step(const Walk& walk) const {
    return static_cast<int>(walk.step) * static_cast<int>(token_stride);
  }
  // The same in bytes.
  template <typename T>
  __device__ __forceinline__ int step_bytes(const Walk& walk) const {
    return step(walk) * static_cast<int>(sizeof(T));
  }
};

// 4, 8 or 16 bytes, moved by one instruction.
template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

template <typename T, int kVector>
using PackWord = typename Word<static_cast<int>(sizeof(T)) * kVector>::Type;

template <typename T, int kVector>
__device__ __forceinline__ PackWord<T, kVector> load_pack(const T* from) {
  return *reinterpret_cast<const PackWord<T, kVector>*>(from);
}

// The two elements of a register.
__device__ __forceinline__ float2 widen_pair(__nv_bfloat16, unsigned pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000U)};
}
__device__ __forceinline__ float2 widen_pair(__half, unsigned pair) {
  __half2 halves;
  memcpy(&halves, &pair, sizeof(pair));
  return __half22float2(halves);
}

template <typename T, int kVector>
__device__ __forceinline__ void widen(const PackWord<T, kVector>& from, float (&to)[kVector]) {
  constexpr int kRegisters = static_cast<int>(sizeof(T)) * kVector / 4;
  unsigned registers[kRegisters];
  memcpy(registers, &from, sizeof(from));
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(registers[i]);
    } else {
      const float2 pair = widen_pair(T{}, registers[i]);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }
}

// Division by a number that a launch knows, by a multiplication where all quotients asked for fit: n /
// divisor is (n * multiplier) >> (32 + shift) for n below 2^31 (Granlund and Montgomery 1994, "Division by
// invariant integers using multiplication", section 4).
struct Divisor {
  std::int64_t divisor = 1;
  unsigned multiplier = 0;  // 0: by division
  int shift = 0;

  Divisor() = default;
  // For n up to d * most.
  Divisor(std::int64_t d, std::int64_t most) : divisor(d) {
    constexpr std::int64_t kLimit = (std::int64_t{1} << 31) - 1024;  // the last block may ask beyond
    if (d <= 1 || d >= kLimit || most >= kLimit / d) return;
    int bits = 0;
    while ((std::int64_t{1} << bits) < d) ++bits;
    shift = bits - 1;
    multiplier = static_cast<unsigned>(((std::uint64_t{1} << (31 + bits)) + d - 1) / d);
  }
  __device__ __forceinline__ std::int64_t quotient(std::int64_t n) const {
    if (multiplier != 0) return __umulhi(static_cast<unsigned>(n), multiplier) >> shift;
    return divisor == 1 ? n : n / divisor;
  }
};

// How the taps and the bias of some channels can be read as words: densely packed, of x's type or f32, and at
// addresses that are multiples of 8.
struct FilterWords {
  const void* weight = nullptr;  // null: not in this way
  const void* bias = nullptr;
  bool wide = false;  // f32

  FilterWords() = default;
  FilterWords(const Tensor& w, const Tensor& b, DType x) {
    const auto fits = [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.raw()) % 8 == 0; };
    if ((w.dtype() != x && w.dtype() != DType::f32) || !w.is_contiguous() || !fits(w)) return;
    if (b && (b.dtype() != w.dtype() || b.stride(0) != 1 || !fits(b))) return;
    weight = w.raw();
    bias = b ? b.raw() : nullptr;
    wide = w.dtype() == DType::f32;
  }
};

// `count` elements that lie side by side, by words of at most 8 bytes.
template <typename T, int kCount>
__device__ __forceinline__ void load_words(const T* from, float (&to)[kCount]) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T));
  using Part = typename Word<kBytes % 8 == 0 ? 8 : 4>::Type;
  constexpr int kParts = kBytes / static_cast<int>(sizeof(Part));
  Part parts[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) parts[i] = reinterpret_cast<const Part*>(from)[i];
  T elements[kCount];
  memcpy(elements, parts, sizeof(parts));
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = cuda::to_float(elements[i]);
}

template <typename T, int kTaps, int kVector>
__device__ __forceinline__ void load_filter(const FilterWords& words, std::int64_t channel,
                                            float (&weight)[kTaps][kVector], float (&bias)[kVector]) {
  float taps[kVector * kTaps];
  load_words(static_cast<const T*>(words.weight) + channel * kTaps, taps);
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
#pragma unroll
    for (int v = 0; v < kVector; ++v) weight[k][v] = taps[v * kTaps + k];
#pragma unroll
  for (int v = 0; v < kVector; ++v) bias[v] = 0.0F;
  if (words.bias != nullptr) load_words(static_cast<const T*>(words.bias) + channel, bias);
}

// The taps and the bias of kVector channels; T is x's type.
template <typename T, int kTaps, int kVector>
__device__ __forceinline__ void load_filter(const FilterWords& words, const Filter& filter,
                                            std::int64_t channel, float (&weight)[kTaps][kVector],
                                            float (&bias)[kVector]) {
  if (words.weight != nullptr && words.wide) {
    load_filter<float>(words, channel, weight, bias);
  } else if (words.weight != nullptr) {
    load_filter<T>(words, channel, weight, bias);
  } else {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) weight[k][v] = filter.weight.load(channel + v, k);
      bias[v] = filter.bias_of(channel + v);
    }
  }
}

// Two neighbours as one register.
__device__ __forceinline__ unsigned narrow_pair(__nv_bfloat16, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  unsigned bits = 0;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ unsigned narrow_pair(__half, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  unsigned bits = 0;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// One store: elements that are stored apart would each send a part of a sector to the memory.
template <typename T, int kVector>
__device__ __forceinline__ void store_pack(const float (&from)[kVector], T* to) {
  constexpr int kRegisters = static_cast<int>(sizeof(T)) * kVector / 4;
  unsigned registers[kRegisters];
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) {
    if constexpr (sizeof(T) == 4)
      registers[i] = __float_as_uint(from[i]);
    else
      registers[i] = narrow_pair(T{}, from[2 * i], from[2 * i + 1]);
  }
  PackWord<T, kVector> word;
  if constexpr (kRegisters == 1)
    word = registers[0];
  else if constexpr (kRegisters == 2)
    word = make_uint2(registers[0], registers[1]);
  else
    word = make_uint4(registers[0], registers[1], registers[2], registers[3]);
#if defined(__CUDA_ARCH__)
  __stcg(reinterpret_cast<PackWord<T, kVector>*>(to), word);  // an assignment may be taken apart again
#else
  *reinterpret_cast<PackWord<T, kVector>*>(to) = word;
#endif
}

}  // namespace krait::conv_detail
