// What the warpgroups of the persistent forward (persistent.cu) share: its memory, its barriers, its work.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/mbarrier.cuh"
#include "core/cuda/tensor_map.cuh"
#include "core/cuda/wgmma.cuh"
#include "ops/ssd/cuda/chunks.cuh"
#include "ops/ssd/cuda/pair_factor.cuh"
#include "ops/ssd/cuda/parts.h"

namespace krait::ssd_detail {

using cuda::Operand;
using Panel = cuda::PanelTile<kTokens>;

inline constexpr int kWarpgroup = 128;
inline constexpr int kWarps = kWarpgroup / 32;
inline constexpr int kThreads = 4 * kWarpgroup;
inline constexpr int kStages = 4;
inline constexpr int kTile = Panel::bytes(kChannels);

// Of a chunk and a tile. A state is kept without the decay that it has had since it was last multiplied by
// it: exp(pending) is that decay, whose exponent (in powers of two, as all) is -kMostPending at least.
struct Factors {
  float a[kTokens];  // as Steps has them
  float d[kTokens];
  float start[kTokens];  // exp(pending + a): what the token has of the state as it is kept
  // d exp(-pending - a) where the factors separate, else d exp(a_last - a), of two tokens at a time.
  alignas(8) float left[kTokens];  // PairFactor
  struct alignas(16) Whole {
    float last;   // of a
    float scale;  // of the state: after the chunk where the factors separate, else before
    float rest;   // exp(pending) after the chunk
    int way;      // 0: the factors do not separate, 1: they do, 2: and the state is scaled
  } whole;
};
inline constexpr float kMostPending = 32.0F;

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct Layout {
  static constexpr int kRowsOfN = Panel::bytes(kN);
  // Of a stage. x is overwritten with y.
  static constexpr int x = 0;
  static constexpr int B = 2 * kTile;
  static constexpr int C = B + kRowsOfN;
  static constexpr int stage = C + kRowsOfN;

  static constexpr int pairs = kStages * stage;      // two: C B^T, 0 above the diagonal
  static constexpr int factors = pairs + 2 * kTile;  // of each stage and tile
  static constexpr int barriers = factors + kStages * 2 * static_cast<int>(sizeof(Factors));
  static constexpr int number = barriers + 6 * kStages * 8;  // of the block
  static constexpr int total = number + 16;
};

// Of x, B, C and outputs, where they are copied by tiles: whole rows that are walked from their first token
// on.
struct Maps {
  CUtensorMap x, B, C, out;
};

// What blocks hand on: memory that is not read before it was written in the same launch, but for `there`,
// `begun` and `ticket`, which begin as 0.
struct Exchange {
  float4* states = nullptr;   // (blocks, 2, elements of a thread, threads)
  float* decays = nullptr;    // (blocks, 2)
  unsigned* there = nullptr;  // (blocks, 2): the state is there
  // (blocks, 2): nobody reads the initial state of the block's last unit again. Absent where final states do
  // not replace initial ones.
  unsigned* begun = nullptr;
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

// Whether exp(a_i - a_j) may be formed as exp(a_i) exp(-a_j) in a chunk, whose sum of exponents is, with what
// is pending, `last` in powers of two: the second factor, which multiplies d x before it is rounded, and the
// sums of products with it have to be far from the largest number. Those of f16 are too few for that.
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
  Segment segment = chunks.of_run(part.run, part.begin);
  const Segment last = chunks.of_run(part.run, part.begin + part.count - 1);
  segment.count = std::int64_t{part.count - 1} * kTokens + last.count;
  segment.final = last.final;
  return segment;
}

// Tile `which` (0, 1) of a pair; where their number is odd the last pair has one twice.
struct TileOf {
  std::int64_t group, head, channel0;
  bool own;
  __device__ TileOf(const Inputs& in, int pair, int which) {
    const int of_head = static_cast<int>(in.headdim) / kChannels;
    const int tiles = static_cast<int>(in.heads_per_group) * of_head;
    const int pairs = (tiles + 1) / 2;
    group = pair / pairs;
    int tile = pair % pairs * 2 + which;
    own = tile < tiles;
    tile = own ? tile : tiles - 1;
    head = group * in.heads_per_group + tile / of_head;
    channel0 = tile % of_head * kChannels;
  }
};

// An operand of products as describe() has it, in a tile that begins at `tile`: what depends on the tile is
// formed once, and numbers that are the same in all threads stay so.
template <Operand kOperand>
struct TileOperand {
  std::uint64_t begin;
  // `offset` bytes behind `tile`.
  __device__ __forceinline__ TileOperand(unsigned tile, unsigned offset)
      : begin(cuda::describe<kTokens, kOperand>(tile, 0, 0)) {
    begin = begin >> 32 << 32 | (static_cast<unsigned>(begin) + offset / 16);
  }
  // From `row` and `column` on, a part of the tile: no sum leaves the descriptor's bits for addresses.
  __device__ __forceinline__ std::uint64_t at(int row, int column) const {
    const unsigned low =
        static_cast<unsigned>(begin) +
        static_cast<unsigned>(column / 64 * Panel::kPanel + row * 128 + column % 64 * 2) / 16;
    return begin >> 32 << 32 | low;
  }
};

// Barriers, by address, of each stage: `loaded` by copies, `factored` and `paired` when factors and C B^T are
// there (of C B^T there are two), `empty` when all that has been read, `written` when outputs are in the
// place of x, and `stored` when they no longer are. Who waits for one does so in every chunk, or could not
// tell its phases apart.
struct Barriers {
  unsigned at;
  __device__ unsigned loaded(int stage) const { return of(0, stage); }
  __device__ unsigned factored(int stage) const { return of(1, stage); }
  __device__ unsigned paired(int stage) const { return of(2, stage); }
  __device__ unsigned empty(int stage) const { return of(3, stage); }
  __device__ unsigned written(int stage) const { return of(4, stage); }
  __device__ unsigned stored(int stage) const { return of(5, stage); }

 private:
  __device__ unsigned of(int kind, int stage) const {
    return at + static_cast<unsigned>((kind * kStages + stage) * 8);
  }
};

// A chunk's place among those of the block.
__device__ __forceinline__ int stage_of(unsigned k) { return static_cast<int>(k % kStages); }
__device__ __forceinline__ unsigned phase_of(unsigned k) { return k / kStages % 2; }

#endif  // KRAIT_WGMMA

}  // namespace krait::ssd_detail
