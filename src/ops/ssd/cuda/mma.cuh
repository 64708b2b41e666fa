// Tiles of 16-bit elements in shared memory, and products of them on tensor cores (mma.sync m16n8k16 with
// sums in f32, from compute capability 8.0 on). Below that the kernels that use them are not launched.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/exponentials.cuh"
#include "core/cuda/gpu.h"
#include "core/cuda/tensor_cores.cuh"

namespace krait::ssd_detail {

using cuda::exp2_fast;
using cuda::kLog2E;
using cuda::load_matrices;
using cuda::multiply_add;

// Where a vector of 8 elements of a row of kColumns (64 or more) lies, in bytes from the tile's begin.
// Vectors are exchanged within a row so that the same vector of 8 rows that follow one another falls into
// different banks.
template <int kColumns>
__device__ __forceinline__ unsigned tile_offset(int row, int vector) {
  static_assert(kColumns % 64 == 0);
  return static_cast<unsigned>(row * kColumns * 2 + ((vector ^ (row & 7)) * 16));
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// The same number, of which the compiler no longer knows where it is from: what is computed from it stays in
// the loop that it is in. With almost all of an SM's memory given to shared memory, addresses that are kept
// from pass to pass beyond what registers hold come back from the second-level cache each time.
__device__ __forceinline__ int afresh(int v) {
  asm volatile("" : "+r"(v));
  return v;
}
__device__ __forceinline__ unsigned afresh(unsigned v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Two elements in a register; `low` comes first in memory.
template <typename T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&v);
  } else {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&v);
  }
}
template <typename T>
__device__ __forceinline__ float2 unpack(unsigned v) {
  if constexpr (std::is_same_v<T, __half>)
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
  else  // a half where it is in a float is one instruction less than its conversion
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000U));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

// 16 bytes from global to shared memory without a register; zeros where `inside` is false.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
// All copies that the thread has begun are there.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

#else

__device__ __forceinline__ void copy_async(unsigned, const void*, bool) {}
__device__ __forceinline__ void wait_for_copies() {}

#endif

// silu to about 2^-20, which a 16-bit result does not see.
__device__ __forceinline__ float silu_fast(float v) { return __fdividef(v, 1.0F + exp2_fast(v * -kLog2E)); }

// Where two neighbours of a row lie, from the even column 8 `vector` + `column` on, column < 8.
template <int kColumns>
__device__ __forceinline__ unsigned pair_offset(int row, int vector, int column) {
  return static_cast<unsigned>(row * kColumns * 2 + ((row % 8 * 16 + column * 2) ^ (vector * 16)));
}

// Operands of multiply_add from a tile of kColumns columns in shared memory, by its address, which is a
// multiple of 1024. `row` is a multiple of 8 and `vector` of 2: what depends on the lane is then the same in
// all, but for bits.
template <int kColumns>
__device__ __forceinline__ unsigned operand_address(unsigned tile, int row, int vector, int lane_row,
                                                    int lane_vector) {
  const int lane_offset = lane_row * kColumns * 2 + (lane_vector ^ lane_row % 8) * 16;
  return tile + static_cast<unsigned>(row * kColumns * 2 + (lane_offset ^ (vector * 16)));
}

// a = rows [row, row + 16) of the tile, columns [8 vector, 8 vector + 16).
template <int kColumns>
__device__ __forceinline__ void load_a(unsigned (&a)[4], unsigned tile, int row, int vector) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<false>(a, operand_address<kColumns>(tile, row, vector, lane % 16, lane / 16));
}
// a = the transpose of rows [row, row + 16) (the depth), columns [8 vector, 8 vector + 16).
template <int kColumns>
__device__ __forceinline__ void load_a_transposed(unsigned (&a)[4], unsigned tile, int row, int vector) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<true>(a,
                      operand_address<kColumns>(tile, row, vector, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}
// Two b, b[0..1] and b[2..3]: rows [row, row + 16) (the depth), columns [8 vector, 8 vector + 8) and the
// next 8.
template <int kColumns>
__device__ __forceinline__ void load_b(unsigned (&b)[4], unsigned tile, int row, int vector) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<true>(b, operand_address<kColumns>(tile, row, vector, lane % 16, lane / 16));
}
// Two b from the tile's transpose: its columns [8 vector, 8 vector + 16) are the depth, its rows [row, row +
// 8) and the next 8 the columns.
template <int kColumns>
__device__ __forceinline__ void load_b_transposed(unsigned (&b)[4], unsigned tile, int row, int vector) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  load_matrices<false>(b,
                       operand_address<kColumns>(tile, row, vector, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}

}  // namespace krait::ssd_detail
