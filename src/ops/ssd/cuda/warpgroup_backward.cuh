// What the warpgroups of warpgroup_backward.cu share: shared memory, barriers, the items of a block, and the
// order of tokens.
#pragma once

#include <cstdint>

#include "core/cuda/mbarrier.cuh"
#include "core/cuda/tensor_map.cuh"
#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/cuda/panels.cuh"

namespace krait::ssd_detail {

inline constexpr int kGroup = 128;  // threads of a warpgroup
inline constexpr int kWarps = kGroup / 32;
inline constexpr int kRowStages = 4;    // of x and dy
inline constexpr int kStateStages = 3;  // of S and G
inline constexpr int kHeadSlots = 6;    // two heads are worked on, two are finished, two made ready

// Tokens of a chunk are kept in strips of 8, in this order: warp w, which has rows 16 w to 16 w + 15 of sums,
// has the tokens of strips w and 7 - w, so that all warps have equally many pairs on one side of the
// diagonal.
__host__ __device__ constexpr int strip_at(int place) { return place % 2 == 0 ? place / 2 : 7 - place / 2; }

// Sums of one value for each token. What several warps have a part of is kept apart by them, and added in
// order.
enum Sum {
  kRows,                    // of T over j: by the warps, which have the rows j
  kStart = kRows + kWarps,  // exp(a) dy . S C
  kColumns,  // of T over i, d x . v of the chunk's own pairs: what stands on the diagonal cancels to the bit
  kEnds,     // d x . v of what comes after the chunk
  kSums,
};

// What no exponent comes near.
inline constexpr float kNever = 1e30F;

// d of a token, where sums are divided by it again.
__device__ __forceinline__ float divisor_of(float d) {
  constexpr float kLeast = 1e-18F;
  return fabsf(d) < kLeast ? kLeast : d;
}

// Values of a head.
struct alignas(16) Values {
  Steps steps;
  float sums[kSums][kTokens];
  float skip[kWarps];  // <dy, x>
  float D;
  float rate;
};

// What a block works on, in shared memory: a chunk, and heads of a group. Two heads are taken side by side,
// by one warpgroup of pairs each, and their channels 64 at a time.
struct Work {
  Segment chunk;
  std::int64_t s, group, part;
  int first_head, heads, tiles;

  __device__ Work(const Inputs& in, const Segments& chunks, std::int64_t parts)
      : s(blockIdx.x / (in.groups * parts)),
        group(blockIdx.x / parts % in.groups),
        part(blockIdx.x % parts),
        tiles(static_cast<int>(in.headdim / kChannels)) {
    chunk = chunks.at(s);
    const std::int64_t heads_of_part = (in.heads_per_group + parts - 1) / parts;
    const std::int64_t begin = min(part * heads_of_part, in.heads_per_group);
    first_head = static_cast<int>(group * in.heads_per_group + begin);
    heads = static_cast<int>(min(heads_of_part, in.heads_per_group - begin));
  }
};

// Of strips of tokens, where they are copied by tiles: whole rows that are walked from their first token on.
struct RowMaps {
  CUtensorMap x, dout, B, C, dx;
};

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct ChunkLayout {
  static constexpr int kOfN = kTokens * kN * 2;
  static constexpr int kOfP = kTokens * kChannels * 2;
  static constexpr int B = 0;
  static constexpr int C = B + kOfN;
  static constexpr int dx = C + kOfN;  // of each warpgroup of pairs; at the end its sum of W^T
  static constexpr int rows = dx + 2 * kOfP;
  // Of a stage of rows, from its begin.
  static constexpr int x = 0;
  static constexpr int dy = x + kOfP;
  static constexpr int row_stage = dy + kOfP;
  static constexpr int states = rows + kRowStages * row_stage;
  // Of a stage of states: (channels, N).
  static constexpr int S = 0;
  static constexpr int G = S + kOfN;
  static constexpr int state_stage = G + kOfN;
  static constexpr int values = states + kStateStages * state_stage;
  static constexpr int barriers = values + kHeadSlots * static_cast<int>(sizeof(Values));
  static constexpr int work = barriers + (2 * kRowStages + 3 * kStateStages + 3 * kHeadSlots + 1) * 8;
  static constexpr int total = work + static_cast<int>(sizeof(Work));
};

// One after the other the items of a block: 64 channels of a head. Where the number of heads is odd the last
// one has nothing at its side.
struct Item {
  int heads, tiles;  // as `work` has them, which waits would have read again
  int number;
  int head;  // of the block's
  int tile = 0;

  __device__ explicit Item(const Work& work, int first = 0)
      : heads(work.heads), tiles(work.tiles), number(first), head(first) {}
  [[nodiscard]] __device__ bool exists() const { return (head & ~1) < heads; }
  [[nodiscard]] __device__ bool there() const { return head < heads; }  // something
  [[nodiscard]] __device__ bool ends_head() const { return tile + 1 == tiles; }
  __device__ void next() {  // for who takes all
    ++number;
    head ^= 1;
    if (head % 2 == 0 && ++tile == tiles) {
      tile = 0;
      head += 2;
    }
  }
  __device__ void next_of_head() {  // for who takes every second head
    number += 2;
    if (++tile == tiles) {
      tile = 0;
      head += 2;
    }
  }
  [[nodiscard]] __device__ int row_stage() const { return remainder_of(number, kRowStages); }
  [[nodiscard]] __device__ int state_stage() const { return remainder_of(number, kStateStages); }
  [[nodiscard]] __device__ int slot() const { return remainder_of(head, kHeadSlots); }
  // How many times all stages, or slots, have been gone through, by parity.
  [[nodiscard]] static __device__ unsigned pass_of(int number, unsigned stages) {
    return static_cast<unsigned>(number) / stages % 2;
  }
  // Without what numbers below 0 would take.
  [[nodiscard]] static __device__ int remainder_of(int number, unsigned stages) {
    return static_cast<int>(static_cast<unsigned>(number) % stages);
  }
};

#ifdef KRAIT_WGMMA

struct ChunkBarriers {
  unsigned at;

  [[nodiscard]] __device__ unsigned constants() const { return at; }
  [[nodiscard]] __device__ unsigned rows_full(int stage) const { return at + 8 + stage * 16; }
  [[nodiscard]] __device__ unsigned rows_empty(int stage) const { return rows_full(stage) + 8; }
  // Of a stage the even and the odd items have one each, as who waits for every second item must not miss a
  // phase of what it waits for.
  [[nodiscard]] __device__ unsigned states_full(int number) const {
    return at + 8 + kRowStages * 16 + Item::remainder_of(number, 2 * kStateStages) * 8;
  }
  [[nodiscard]] __device__ unsigned states_empty(int stage) const {
    return at + 8 + kRowStages * 16 + 2 * kStateStages * 8 + stage * 8;
  }
  // Of a slot of a head: its steps are there, its sums, and both have been read.
  [[nodiscard]] __device__ unsigned steps(int slot) const {
    return at + 8 + kRowStages * 16 + 3 * kStateStages * 8 + slot * 24;
  }
  [[nodiscard]] __device__ unsigned sums(int slot) const { return steps(slot) + 8; }
  [[nodiscard]] __device__ unsigned finished(int slot) const { return steps(slot) + 16; }

  // `copying`: threads that arrive when rows are there.
  __device__ void begin(unsigned copying) const {
    cuda::begin_barrier(constants(), copying);
    for (int i = 0; i < kRowStages; ++i) {
      cuda::begin_barrier(rows_full(i), copying);
      cuda::begin_barrier(rows_empty(i), cuda::arrivals_of(2 * kWarps));
    }
    for (int i = 0; i < 2 * kStateStages; ++i) cuda::begin_barrier(states_full(i), 1);
    for (int i = 0; i < kStateStages; ++i)
      cuda::begin_barrier(states_empty(i), cuda::arrivals_of(2 * kWarps + 1));
    for (int i = 0; i < kHeadSlots; ++i) {
      cuda::begin_barrier(steps(i), cuda::arrivals_of(1));
      cuda::begin_barrier(sums(i), cuda::arrivals_of(2 * kWarps));
      cuda::begin_barrier(finished(i), cuda::arrivals_of(1));
    }
    cuda::fence_barriers();
  }

  // For what has been filled for the item.
  __device__ void wait_for_rows(const Item& item) const {
    cuda::wait_for_phase(rows_full(item.row_stage()), Item::pass_of(item.number, kRowStages));
  }
  __device__ void wait_for_states(const Item& item) const {
    cuda::wait_for_phase(states_full(item.number), Item::pass_of(item.number, 2 * kStateStages));
  }
  __device__ void wait_for_steps(const Item& item) const {
    cuda::wait_for_phase(steps(item.slot()), Item::pass_of(item.head, kHeadSlots));
  }
};

// d = a b over kDepth steps, from tiles in shared memory.
template <typename T, int kDepth, cuda::Operand kA, cuda::Operand kB, int kTiles>
__device__ __forceinline__ void begin_product(float (&d)[kTiles][4], unsigned a, unsigned b) {
  constexpr auto at = [](cuda::Operand operand, int k) {
    return operand == cuda::Operand::across_depth ? k * 128 : k / 64 * Panels::kPanel + k % 64 * 2;
  };
  const std::uint64_t of_a = cuda::describe<kTokens, kA>(a, 0, 0);
  const std::uint64_t of_b = cuda::describe<kTokens, kB>(b, 0, 0);
  cuda::fence_sums();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16)
    cuda::multiply_add_async<T, kA, kB>(d, cuda::behind(of_a, at(kA, k)), cuda::behind(of_b, at(kB, k)),
                                        k > 0);
  cuda::commit_products();
}
// d += a b of kTokens steps of depth, with the rows of b across it.
template <typename T, int kTiles>
__device__ __forceinline__ void begin_product(float (&d)[kTiles][4], const unsigned (&a)[4][4], unsigned b) {
  const std::uint64_t of_b = cuda::describe<kTokens, cuda::Operand::across_depth>(b, 0, 0);
  cuda::fence_sums();
#pragma unroll
  for (int k = 0; k < 4; ++k)
    cuda::multiply_add_async<T, cuda::Operand::across_depth>(d, a[k], cuda::behind(of_b, k * 16 * 128), 1);
  cuda::commit_products();
}

// The sum over the four lanes that share a row of a fragment.
__device__ __forceinline__ float sum_of_row(float v) {
  v += __shfl_xor_sync(0xffffffffU, v, 1);
  return v + __shfl_xor_sync(0xffffffffU, v, 2);
}

// 16 rows from `row` on of a tile, 16 kPairs columns from 8 `vector` on, as a warp has them of a warpgroup's
// sums: two neighbours of fragment n, 8 rows below or not, are in v[n / 2][n % 2 * 2 + below].
template <int kPairs>
__device__ __forceinline__ void load_rows_of_warp(unsigned (&v)[kPairs][4], unsigned tile, int row,
                                                  int vector, int lane) {
#pragma unroll
  for (int k = 0; k < kPairs; ++k)
    load_matrices<false>(v[k], operand_address<64>(tile, row, vector + 2 * k, lane % 16, lane / 16));
}

#endif

}  // namespace krait::ssd_detail
