// Products of whole warpgroups (4 warps that follow one another, the first a multiple of 4) on the tensor
// cores of compute capability 9.0a: 16-bit operands from shared memory, sums in f32 in registers. They run
// beside what the warps do meanwhile, in this order:
//
//   fence_sums();                        the registers of sums (and of a left operand) are written
//   multiply_add_async(...); ...         any number
//   commit_products();                   closes a group
//   wait_for_products<n>();              all but the n latest groups are done
//
// Between the first product and the wait nothing may touch the registers of its sums nor of its left operand;
// keep_registers(d) after the wait holds the compiler to that. ptxas makes products wait for one another (and
// says so, C75xx) where it cannot see that warps of a warpgroup stay together (numbers of warps come from
// __shfl_sync), where anything else writes sums while products run that a later one adds to, and where
// products of fewer columns add to a part of an array. What threads write to shared memory becomes visible to
// products by fence_shared() in each writing thread, followed by a barrier.
//
// Only where KRAIT_WGMMA is defined: kernels have a body without it, which is never launched
// (cuda::has_warpgroup_products).
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/gpu.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KRAIT_WGMMA 1
#endif

namespace krait::cuda {

// A tile of kRows rows and any number of columns of 16 bits, cut into panels of 64 columns. A row of a panel
// has 128 bytes, whose vectors of 16 bytes are exchanged so that 8 rows that follow one another fall into
// different banks (the hardware's 128-byte swizzle). Tiles begin at multiples of 1024 bytes.
template <int kRows>
struct PanelTile {
  static_assert(kRows % 8 == 0);
  static constexpr int kPanel = kRows * 128;  // bytes
  static constexpr int bytes(int columns) { return columns / 64 * kPanel; }

  // Where 8 columns from 8 `vector` on lie, in bytes from the tile's begin.
  static __device__ __forceinline__ unsigned offset(int row, int vector) {
    const auto r = static_cast<unsigned>(row);
    const auto v = static_cast<unsigned>(vector);
    return v / 8 * kPanel + r * 128 + ((v % 8) ^ (r % 8)) * 16;
  }
  // Where columns 8 `vector` + `column` and the next lie, column even and below 8.
  static __device__ __forceinline__ unsigned pair_offset(int row, int vector, int column) {
    return offset(row, vector) + static_cast<unsigned>(column * 2);
  }
};

// How an operand lies in its tile: `along_depth`: its rows (or columns, of the right one) are rows of the
// tile, the depth runs along them. `across_depth`: rows of the tile are steps of the depth.
enum class Operand { along_depth = 0, across_depth = 1 };

// The descriptor of an operand, 16 steps of depth of it, in a PanelTile<kRows> at `tile` (an address in
// shared memory). along_depth: rows from `row` (a multiple of 8) on, depth from `column` (a multiple of 16)
// on. across_depth: depth from `row` (a multiple of 8) on, columns from `column` (a multiple of 64) on; up to
// as many panels as the product is wide are used.
template <int kRows, Operand kOperand>
__device__ __forceinline__ std::uint64_t describe(unsigned tile, int row, int column) {
  constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t kEightRows = std::uint64_t{1024 / 16} << 32;
  constexpr std::uint64_t kNextPanel = std::uint64_t{PanelTile<kRows>::kPanel / 16} << 16;
  static_assert(PanelTile<kRows>::kPanel / 16 < 1 << 14);
  const unsigned at =
      tile + static_cast<unsigned>(column / 64 * PanelTile<kRows>::kPanel + row * 128 + column % 64 * 2);
  return kSwizzle128 | kEightRows |
         (kOperand == Operand::across_depth ? kNextPanel : std::uint64_t{1} << 16) | ((at >> 4) & 0x3fffU);
}

// That of what lies `bytes` behind, a multiple of 16: one addition, where describe() takes several.
__device__ __forceinline__ std::uint64_t behind(std::uint64_t descriptor, int bytes) {
  return (descriptor & ~std::uint64_t{0xffffffff}) |
         (static_cast<std::uint32_t>(descriptor) + static_cast<std::uint32_t>(bytes >> 4));
}

#ifdef KRAIT_WGMMA

// Registers of a thread, given up or taken by a whole warpgroup: a multiple of 8.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

// Writes of this thread to shared memory before it come before what products read after the next barrier.
__device__ __forceinline__ void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
__device__ __forceinline__ void fence_sums() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int kRunning>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kRunning) : "memory");
}

template <int kCount>
__device__ __forceinline__ void keep_registers(float (&d)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(d[n][k])::"memory");
  }
}
template <int kCount>
__device__ __forceinline__ void keep_registers(unsigned (&a)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int k = 0; k < 4; ++k) asm volatile("" : "+r"(a[n][k])::"memory");
  }
}

#define KRAIT_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define KRAIT_REGISTERS_16 \
  KRAIT_REGISTERS_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define KRAIT_REGISTERS_32 \
  KRAIT_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KRAIT_REGISTERS_64                                                                       \
  KRAIT_REGISTERS_32                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KRAIT_REGISTERS_96                                                                       \
  KRAIT_REGISTERS_64                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define KRAIT_REGISTERS_128                                                                    \
  KRAIT_REGISTERS_96                                                                           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

#define KRAIT_SUM(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define KRAIT_SUMS_2(n) KRAIT_SUM(n), KRAIT_SUM((n) + 1)
#define KRAIT_SUMS_4(n) KRAIT_SUMS_2(n), KRAIT_SUMS_2((n) + 2)
#define KRAIT_SUMS_8(n) KRAIT_SUMS_4(n), KRAIT_SUMS_4((n) + 4)
#define KRAIT_SUMS_16(n) KRAIT_SUMS_8(n), KRAIT_SUMS_8((n) + 8)
#define KRAIT_SUMS_24(n) KRAIT_SUMS_16(n), KRAIT_SUMS_8((n) + 16)
#define KRAIT_SUMS_32(n) KRAIT_SUMS_16(n), KRAIT_SUMS_16((n) + 16)

// From shared memory: descriptors a, b; from registers: a[4], descriptor b.
#define KRAIT_FROM_SHARED(type, columns, registers, sums, a_at, b_at, p_at, ta_at, tb_at)              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p_at                                               \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers     \
               "}, %" a_at ", %" b_at ", p, 1, 1, %" ta_at ", %" tb_at ";\n}\n"                        \
               : sums                                                                                  \
               : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kA)), "n"(static_cast<int>(kB)) \
               : "memory")
#define KRAIT_FROM_REGISTERS(type, columns, registers, sums, a0, a1, a2, a3, b_at, p_at, tb_at)    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p_at                                           \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers \
               "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_at ", p, 1, 1, %" tb_at ";\n}\n"     \
               : sums                                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),              \
                 "n"(static_cast<int>(kB))                                                         \
               : "memory")

// d (64 x 8 kTiles) = a (64 x 16) b (16 x 8 kTiles), added to d where `accumulate` is not 0. Of d, warp w of
// the warpgroup has rows 16 w to 16 w + 15, and of 8 columns d[n] a lane has row lane / 4, columns 2 (lane %
// 4) and the next, then the same 8 rows below: what mma.sync has. T is __half or __nv_bfloat16.
template <typename T, Operand kA, Operand kB, int kTiles>
__device__ __forceinline__ void multiply_add_async(float (&d)[kTiles][4], std::uint64_t a, std::uint64_t b,
                                                   int accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 24 || kTiles == 32);
  if constexpr (kTiles == 2 && kHalf)
    KRAIT_FROM_SHARED("f16", "16", KRAIT_REGISTERS_8, KRAIT_SUMS_2(0), "8", "9", "10", "11", "12");
  else if constexpr (kTiles == 2 && !kHalf)
    KRAIT_FROM_SHARED("bf16", "16", KRAIT_REGISTERS_8, KRAIT_SUMS_2(0), "8", "9", "10", "11", "12");
  else if constexpr (kTiles == 4 && kHalf)
    KRAIT_FROM_SHARED("f16", "32", KRAIT_REGISTERS_16, KRAIT_SUMS_4(0), "16", "17", "18", "19", "20");
  else if constexpr (kTiles == 4 && !kHalf)
    KRAIT_FROM_SHARED("bf16", "32", KRAIT_REGISTERS_16, KRAIT_SUMS_4(0), "16", "17", "18", "19", "20");
  else if constexpr (kTiles == 8 && kHalf)
    KRAIT_FROM_SHARED("f16", "64", KRAIT_REGISTERS_32, KRAIT_SUMS_8(0), "32", "33", "34", "35", "36");
  else if constexpr (kTiles == 8 && !kHalf)
    KRAIT_FROM_SHARED("bf16", "64", KRAIT_REGISTERS_32, KRAIT_SUMS_8(0), "32", "33", "34", "35", "36");
  else if constexpr (kTiles == 16 && kHalf)
    KRAIT_FROM_SHARED("f16", "128", KRAIT_REGISTERS_64, KRAIT_SUMS_16(0), "64", "65", "66", "67", "68");
  else if constexpr (kTiles == 16 && !kHalf)
    KRAIT_FROM_SHARED("bf16", "128", KRAIT_REGISTERS_64, KRAIT_SUMS_16(0), "64", "65", "66", "67", "68");
  else if constexpr (kTiles == 24 && kHalf)
    KRAIT_FROM_SHARED("f16", "192", KRAIT_REGISTERS_96, KRAIT_SUMS_24(0), "96", "97", "98", "99", "100");
  else if constexpr (kTiles == 24 && !kHalf)
    KRAIT_FROM_SHARED("bf16", "192", KRAIT_REGISTERS_96, KRAIT_SUMS_24(0), "96", "97", "98", "99", "100");
  else if constexpr (kTiles == 32 && kHalf)
    KRAIT_FROM_SHARED("f16", "256", KRAIT_REGISTERS_128, KRAIT_SUMS_32(0), "128", "129", "130", "131", "132");
  else if constexpr (kTiles == 32 && !kHalf)
    KRAIT_FROM_SHARED("bf16", "256", KRAIT_REGISTERS_128, KRAIT_SUMS_32(0), "128", "129", "130", "131",
                      "132");
}

// The same with a in registers, as the left operand of mma.sync: rows and columns of a lane as in d.
template <typename T, Operand kB, int kTiles>
__device__ __forceinline__ void multiply_add_async(float (&d)[kTiles][4], const unsigned (&a)[4],
                                                   std::uint64_t b, int accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kTiles == 2 || kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 24 || kTiles == 32);
  if constexpr (kTiles == 2 && kHalf)
    KRAIT_FROM_REGISTERS("f16", "16", KRAIT_REGISTERS_8, KRAIT_SUMS_2(0), "8", "9", "10", "11", "12", "13",
                         "14");
  else if constexpr (kTiles == 2 && !kHalf)
    KRAIT_FROM_REGISTERS("bf16", "16", KRAIT_REGISTERS_8, KRAIT_SUMS_2(0), "8", "9", "10", "11", "12", "13",
                         "14");
  else if constexpr (kTiles == 4 && kHalf)
    KRAIT_FROM_REGISTERS("f16", "32", KRAIT_REGISTERS_16, KRAIT_SUMS_4(0), "16", "17", "18", "19", "20", "21",
                         "22");
  else if constexpr (kTiles == 4 && !kHalf)
    KRAIT_FROM_REGISTERS("bf16", "32", KRAIT_REGISTERS_16, KRAIT_SUMS_4(0), "16", "17", "18", "19", "20",
                         "21", "22");
  else if constexpr (kTiles == 8 && kHalf)
    KRAIT_FROM_REGISTERS("f16", "64", KRAIT_REGISTERS_32, KRAIT_SUMS_8(0), "32", "33", "34", "35", "36", "37",
                         "38");
  else if constexpr (kTiles == 8 && !kHalf)
    KRAIT_FROM_REGISTERS("bf16", "64", KRAIT_REGISTERS_32, KRAIT_SUMS_8(0), "32", "33", "34", "35", "36",
                         "37", "38");
  else if constexpr (kTiles == 16 && kHalf)
    KRAIT_FROM_REGISTERS("f16", "128", KRAIT_REGISTERS_64, KRAIT_SUMS_16(0), "64", "65", "66", "67", "68",
                         "69", "70");
  else if constexpr (kTiles == 16 && !kHalf)
    KRAIT_FROM_REGISTERS("bf16", "128", KRAIT_REGISTERS_64, KRAIT_SUMS_16(0), "64", "65", "66", "67", "68",
                         "69", "70");
  else if constexpr (kTiles == 24 && kHalf)
    KRAIT_FROM_REGISTERS("f16", "192", KRAIT_REGISTERS_96, KRAIT_SUMS_24(0), "96", "97", "98", "99", "100",
                         "101", "102");
  else if constexpr (kTiles == 24 && !kHalf)
    KRAIT_FROM_REGISTERS("bf16", "192", KRAIT_REGISTERS_96, KRAIT_SUMS_24(0), "96", "97", "98", "99", "100",
                         "101", "102");
  else if constexpr (kTiles == 32 && kHalf)
    KRAIT_FROM_REGISTERS("f16", "256", KRAIT_REGISTERS_128, KRAIT_SUMS_32(0), "128", "129", "130", "131",
                         "132", "133", "134");
  else if constexpr (kTiles == 32 && !kHalf)
    KRAIT_FROM_REGISTERS("bf16", "256", KRAIT_REGISTERS_128, KRAIT_SUMS_32(0), "128", "129", "130", "131",
                         "132", "133", "134");
}

#undef KRAIT_FROM_SHARED
#undef KRAIT_FROM_REGISTERS
#undef KRAIT_SUM
#undef KRAIT_SUMS_2
#undef KRAIT_SUMS_4
#undef KRAIT_SUMS_8
#undef KRAIT_SUMS_16
#undef KRAIT_SUMS_24
#undef KRAIT_SUMS_32
#undef KRAIT_REGISTERS_8
#undef KRAIT_REGISTERS_16
#undef KRAIT_REGISTERS_32
#undef KRAIT_REGISTERS_64
#undef KRAIT_REGISTERS_96
#undef KRAIT_REGISTERS_128

#endif  // KRAIT_WGMMA

}  // namespace krait::cuda
