// Words that carry results from block to block. A word is stored and read as a whole, so that whoever finds
// the epoch that it waits for has the values that belong to it: no fence, no counter, one trip to the L2
// cache each way. (NCCL's protocol LL works alike.)
//
// A word is never written again before all who read it have done so. Take the words of in_proj in layer l,
// written by block c, and their next writing, by c in layer l + 1. Before that, c has read all of out_proj's
// words of layer l. Every block writes some of these, each after it has read all of y of layer l, which every
// block wrote some of after it had read what it needs of in_proj's words; and gates are read in front of
// out_proj's words themselves. The same goes round from each of the other vectors: y and out_proj's words are
// read as a whole by every block in the stage behind them, from all of whom the next writer has heard;
// x_proj's by all who write y. A block without rows in a stage (x_proj alone) reads nothing in it.
//
// An old epoch is never taken for a new one: epochs only grow, from launch to launch (the kernel counts them
// itself, in memory beside the words), and what a word holds when a layer begins was written a few layers
// ago, not 2^32. A new word is 0, an epoch that the first launch does not have.
#pragma once

#include "core/cuda/elements.cuh"
#include "ops/decode_step/plan.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace krait::decode_detail {

// Two neighbouring words: values and epochs of both.
struct Pair {
  unsigned v0;
  unsigned e0;
  unsigned v1;
  unsigned e1;
};

__device__ __forceinline__ Pair load_pair(const std::uint64_t* at) {
  Pair pair;
  asm volatile(
      "{\n"
      ".reg .b64 a, b;\n"
      "ld.relaxed.gpu.global.v2.b64 {a, b}, [%4];\n"
      "mov.b64 {%0, %1}, a;\n"
      "mov.b64 {%2, %3}, b;\n"
      "}\n"
      : "=r"(pair.v0), "=r"(pair.e0), "=r"(pair.v1), "=r"(pair.e1)
      : "l"(at));
  return pair;
}
__device__ __forceinline__ uint2 load_word(const std::uint64_t* at) {
  unsigned value;
  unsigned epoch;
  asm volatile(
      "{\n"
      ".reg .b64 a;\n"
      "ld.relaxed.gpu.global.b64 a, [%2];\n"
      "mov.b64 {%0, %1}, a;\n"
      "}\n"
      : "=r"(value), "=r"(epoch)
      : "l"(at));
  return {value, epoch};
}
__device__ __forceinline__ void store_word(std::uint64_t* at, unsigned value, unsigned epoch) {
  asm volatile(
      "{\n"
      ".reg .b64 a;\n"
      "mov.b64 a, {%1, %2};\n"
      "st.relaxed.gpu.global.b64 [%0], a;\n"
      "}\n" ::"l"(at),
      "r"(value), "r"(epoch)
      : "memory");
}

// Pairs of words from `words` on, those of a warp side by side: a lane has pairs lane, lane + 32, ...
template <int kMost>
class PairReader {
 public:
  __device__ __forceinline__ PairReader(const std::uint64_t* words, int count)
      : words_(words), count_(count) {
#pragma unroll
    for (int i = 0; i < kMost; ++i) pairs_[i] = Pair{0U, 0U, 0U, 0U};
  }

  // All on their way before the first is looked at. Lanes beyond the end read the last pair.
  __device__ __forceinline__ void load() {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (count_ == 0) return;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i * 32 >= count_) break;
      pairs_[i] = load_pair(words_ + 2 * min(i * 32 + lane, count_ - 1));
    }
  }
  [[nodiscard]] __device__ __forceinline__ bool missing(unsigned epoch) const {
    bool is_missing = false;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i * 32 >= count_) break;
      is_missing = is_missing || pairs_[i].e0 != epoch || pairs_[i].e1 != epoch;
    }
    return is_missing && count_ > 0;
  }
  // Zeros beyond the end.
  __device__ __forceinline__ void take(uint2 (&to)[kMost]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const bool inside = i * 32 + lane < count_;
      to[i].x = inside ? pairs_[i].v0 : 0U;
      to[i].y = inside ? pairs_[i].v1 : 0U;
    }
  }

 private:
  const std::uint64_t* words_;
  int count_;
  Pair pairs_[kMost];
};

// By whole warps, as all that waits: until `missing` is false for all lanes.
template <typename Load, typename Missing>
__device__ __forceinline__ void wait_for(const Load& load, const Missing& missing) {
  do {
    load();
  } while (__any_sync(0xffffffffU, missing()));
}

// The values of `count` pairs, once all are there. Of long vectors some pairs, as far apart as they lie, are
// asked for again and again, and all of them then: what all blocks ask for slows the weights down.
template <int kMost>
__device__ __forceinline__ void read_pairs(const std::uint64_t* words, int count, unsigned epoch,
                                           uint2 (&to)[kMost]) {
  if constexpr (kMost > 2) {
    constexpr int kAsked = 8;
    const std::uint64_t* const from = words + 2 * (count / kAsked) * (static_cast<int>(threadIdx.x) % kAsked);
    Pair pair{0U, 0U, 0U, 0U};
    wait_for(
        [&] {
          if (count > 0) pair = load_pair(from);
        },
        [&] { return count > 0 && (pair.e0 != epoch || pair.e1 != epoch); });
  }
  PairReader<kMost> reader(words, count);
  wait_for([&] { reader.load(); }, [&] { return reader.missing(epoch); });
  reader.take(to);
}

// Values of T in 32 bits.
template <typename T>
__device__ __forceinline__ float low_half(unsigned bits) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  else
    return __uint_as_float(bits << 16);
}
template <typename T>
__device__ __forceinline__ float high_half(unsigned bits) {
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)));
  else
    return __uint_as_float(bits & 0xffff0000U);
}
template <typename T>
__device__ __forceinline__ void widen(uint2 bits, float (&to)[4]) {
  to[0] = low_half<T>(bits.x);
  to[1] = high_half<T>(bits.x);
  to[2] = low_half<T>(bits.y);
  to[3] = high_half<T>(bits.y);
}
template <typename T>
__device__ __forceinline__ unsigned bits_of(float v) {
  if constexpr (std::is_same_v<T, __half>)
    return __half_as_ushort(__float2half_rn(v));
  else
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return cuda::to_float(cuda::from_float<T>(v));
}

// What a norm will scale down anyway stays finite in T.
template <typename T>
__device__ __forceinline__ float saturated(float v) {
  constexpr float kMost = 65504.0F;
  if constexpr (std::is_same_v<T, __half>) return v > kMost ? kMost : v < -kMost ? -kMost : v;
  return v;
}

// Neighbouring lanes hold values of rows `row`, the even ones' even: the even ones store both. Values of
// lanes that are not `there` count as 0. By all lanes of a warp.
template <typename T>
__device__ __forceinline__ void publish(std::uint64_t* words, int row, bool there, float value,
                                        unsigned epoch) {
  const unsigned own = there ? bits_of<T>(value) : 0U;
  const unsigned next = __shfl_down_sync(0xffffffffU, own, 1);
  if (there && threadIdx.x % 2 == 0) store_word(words + row / 2, own | next << 16, epoch);
}

}  // namespace krait::decode_detail

#endif
