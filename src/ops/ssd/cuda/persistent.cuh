// What the warpgroups of the persistent forward (persistent.cu) share: its memory, its barriers, its work.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/mbarrier.cuh"
#include "core/cuda/tensor_map.cuh"
#include "core/cuda/wgmma.cuh"
#include "ops/ssd/cuda/chunks.cuh"
#include "ops/ssd/cuda/parts.h"

namespace krait::ssd_detail {

using cuda::Operand;
using Panel = cuda::PanelTile<kTokens>;

inline constexpr int kWarpgroup = 128;
inline constexpr int kThreads = 3 * kWarpgroup;
inline constexpr int kStages = 4;
inline constexpr int kAhead = kStages - 2;  // chunks whose copies run while one is worked on
inline constexpr int kTile = Panel::bytes(kChannels);
inline constexpr int kStagedColumns = 16;  // of a state on its way from or to memory
inline constexpr int kStagingBytes = kChannels * kStagedColumns * static_cast<int>(sizeof(float));

// One value for each token of a chunk, as Steps; but `left` is d exp(-a) where the factors separate.
struct Factors {
  float a[kTokens], d[kTokens], start[kTokens], left[kTokens];
};

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct Layout {
  static constexpr int kRowsOfN = Panel::bytes(kN);
  // Of a stage. x is overwritten with y.
  static constexpr int x = 0;
  static constexpr int B = 2 * kTile;
  static constexpr int C = B + kRowsOfN;
  static constexpr int stage = C + kRowsOfN;

  static constexpr int pairs = kStages * stage;                // two: C B^T, 0 above the diagonal
  static constexpr int staging = pairs + 2 * kTile;            // of each tile
  static constexpr int factors = staging + 2 * kStagingBytes;  // two, of each tile
  static constexpr int steps = factors + 4 * static_cast<int>(sizeof(Factors));
  static constexpr int barriers = steps + kStages * 2 * kTokens * static_cast<int>(sizeof(float2));
  static constexpr int total = barriers + 128;
};

// Of x, B and C, where they are copied by tiles: whole rows that are walked from their first token on.
struct Maps {
  CUtensorMap x, B, C;
};

// What blocks hand on: memory that is not read before it was written in the same launch, but for `flags` and
// `ticket`, which begin as 0.
struct Exchange {
  float4* states = nullptr;  // (blocks, 2, elements of a thread, threads)
  float* decays = nullptr;   // (blocks, 2)
  unsigned* flags = nullptr;
  unsigned* ticket = nullptr;
};

// Chunks of the runs before one.
struct FirstChunk {
  const std::int64_t* first_of_run;  // null where all runs have as many
  int per_run;
  KRAIT_HOST_DEVICE int operator()(int run) const {
    return first_of_run != nullptr ? static_cast<int>(first_of_run[run]) : run * per_run;
  }
};

// Whether exp(a_i - a_j) may be formed as exp(a_i) exp(-a_j) in a chunk, whose sum of exponents is `last` in
// powers of two: the second factor, which multiplies d x before it is rounded, and the sums of products with
// it have to be far from the largest number. Those of f16 are too few for that.
template <typename T>
__device__ __forceinline__ bool factors_separate(float last) {
  constexpr float kLeast = -80.0F;
  return !std::is_same_v<T, __half> && last >= kLeast;  // not where it is NaN
}

#ifdef KRAIT_WGMMA

__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(warpgroup + 1), "n"(kWarpgroup) : "memory");
}

template <bool kTransposed>
__device__ __forceinline__ void store_matrices(unsigned address, const unsigned (&v)[4]) {
  if constexpr (kTransposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
                 "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
                 : "memory");
}

// Tokens of a part as a segment of their own.
__device__ __forceinline__ Segment segment_of(const Segments& chunks, const Part& part) {
  const std::int64_t first = chunks.first(part.run) + part.begin;
  Segment segment = chunks.at(first);
  const Segment last = chunks.at(first + part.count - 1);
  segment.count = std::int64_t{part.count - 1} * kTokens + last.count;
  segment.final = last.final;
  return segment;
}

// Tile `which` (0, 1) of a pair; where their number is odd the last pair has one twice.
struct TileOf {
  std::int64_t group, head, channel0;
  bool own;
  __device__ TileOf(const Inputs& in, std::int64_t pair, int which) {
    const std::int64_t of_head = in.headdim / kChannels;
    const std::int64_t tiles = in.heads_per_group * of_head;
    const std::int64_t pairs = (tiles + 1) / 2;
    group = pair / pairs;
    std::int64_t tile = pair % pairs * 2 + which;
    own = tile < tiles;
    tile = own ? tile : tiles - 1;
    head = group * in.heads_per_group + tile / of_head;
    channel0 = tile % of_head * kChannels;
  }
};

// Barriers, by address, of each stage: `loaded` by copies, `full`, and `empty` again. With its stage go a
// chunk's factors and C B^T, of which there are two.
struct Barriers {
  unsigned at;
  __device__ unsigned full(int stage) const { return at + static_cast<unsigned>(stage * 8); }
  __device__ unsigned empty(int stage) const { return at + static_cast<unsigned>((kStages + stage) * 8); }
  __device__ unsigned loaded(int stage) const {
    return at + static_cast<unsigned>((2 * kStages + stage) * 8);
  }
};

#endif  // KRAIT_WGMMA

}  // namespace krait::ssd_detail
