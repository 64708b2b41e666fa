// The backward of embedding on a GPU: positions are sorted by id, stably, and then the rows of each id are
// added in that order. The sort is a radix sort from the lowest digit up; each pass counts digits in tiles of
// positions, adds up the counts over digits and tiles, and moves each position to its place.
#include <utility>

#include "core/cuda/elements.cuh"
#include "ops/embedding/kernels.h"

namespace krait::embedding_detail {
namespace {

using cuda::AnyView;
using cuda::IndexView;

constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kThreads = 256;
constexpr int kTileWarps = kThreads / 32;
constexpr int kRounds = 8;  // of a warp over its part of a tile
constexpr int kTile = kThreads * kRounds;

struct Keys {
  std::int64_t* key = nullptr;       // ids; `vocabulary` stands for one that is outside
  std::int64_t* position = nullptr;  // of the id in ids
};

__global__ void read_ids(IndexView ids, std::int64_t count, std::int64_t vocabulary, Keys to) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t id = ids(i);
    to.key[i] = id >= 0 && id < vocabulary ? id : vocabulary;
    to.position[i] = i;
  }
}

__device__ __forceinline__ int digit_of(std::int64_t key, int shift) {
  return static_cast<int>(key >> shift & (kDigits - 1));
}

// counts (digits, tiles)
__global__ void __launch_bounds__(kThreads)
    count_digits(Keys from, std::int64_t count, int shift, std::int64_t tiles, std::int64_t* counts) {
  __shared__ int found[kDigits];
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    found[threadIdx.x] = 0;
    __syncthreads();
    for (int round = 0; round < kRounds; ++round) {
      const std::int64_t i = tile * kTile + round * kThreads + threadIdx.x;
      if (i < count) atomicAdd(&found[digit_of(from.key[i], shift)], 1);
    }
    __syncthreads();
    counts[threadIdx.x * tiles + tile] = found[threadIdx.x];
    __syncthreads();
  }
}

// Each count becomes the sum of those before it. One block.
__global__ void __launch_bounds__(1024) sum_counts(std::int64_t* counts, std::int64_t size) {
  __shared__ std::int64_t warp_sums[32];
  __shared__ std::int64_t carried;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) carried = 0;
  for (std::int64_t begin = 0; begin < size; begin += 1024) {
    const std::int64_t i = begin + threadIdx.x;
    const std::int64_t own = i < size ? counts[i] : 0;
    std::int64_t sum = own;  // of this warp up to this lane
    for (int step = 1; step < 32; step *= 2) {
      const std::int64_t other = __shfl_up_sync(0xffffffffU, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      std::int64_t total = warp_sums[lane];
      for (int step = 1; step < 32; step *= 2) {
        const std::int64_t other = __shfl_up_sync(0xffffffffU, total, step);
        if (lane >= step) total += other;
      }
      warp_sums[lane] = total;
    }
    __syncthreads();
    const std::int64_t before = carried + (warp > 0 ? warp_sums[warp - 1] : 0);
    if (i < size) counts[i] = before + sum - own;
    __syncthreads();
    if (threadIdx.x == 0) carried += warp_sums[31];
    __syncthreads();
  }
}

// Warps take consecutive parts of the tile, so that positions of one digit keep their order.
__global__ void __launch_bounds__(kThreads) move_keys(Keys from, Keys to, std::int64_t count, int shift,
                                                      std::int64_t tiles, const std::int64_t* offsets) {
  __shared__ int found[kTileWarps][kDigits];  // of each warp; then of the warps before it
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int w = 0; w < kTileWarps; ++w) found[w][threadIdx.x] = 0;
    __syncthreads();
    std::int64_t keys[kRounds];
    int ranks[kRounds];  // among the keys of this digit in this warp's part
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const std::int64_t i = tile * kTile + (warp * kRounds + round) * 32 + lane;
      keys[round] = i < count ? from.key[i] : 0;
      const unsigned valid = __ballot_sync(0xffffffffU, i < count);
      const int digit = i < count ? digit_of(keys[round], shift) : kDigits;
      const unsigned same = __match_any_sync(0xffffffffU, digit) & valid;
      ranks[round] = 0;
      if (i < count) ranks[round] = found[warp][digit] + __popc(same & ((1U << lane) - 1U));
      __syncwarp();
      if (i < count && lane == __ffs(static_cast<int>(same)) - 1) found[warp][digit] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    int before = 0;
    for (int w = 0; w < kTileWarps; ++w) {
      const int own = found[w][threadIdx.x];
      found[w][threadIdx.x] = before;
      before += own;
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const std::int64_t i = tile * kTile + (warp * kRounds + round) * 32 + lane;
      if (i >= count) continue;
      const int digit = digit_of(keys[round], shift);
      const std::int64_t place = offsets[digit * tiles + tile] + found[warp][digit] + ranks[round];
      to.key[place] = keys[round];
      to.position[place] = from.position[i];
    }
    __syncthreads();
  }
}

// dweight += the rows of each id, in the order of their positions. A warp a range of columns of one id, found
// at the first of its places; kAhead rows are on their way at once.
__global__ void __launch_bounds__(kThreads)
    add_rows(Keys sorted, std::int64_t count, std::int64_t vocabulary, std::int64_t d,
             std::int64_t column_blocks, AnyView<2> dout, AnyView<2> dweight) {
  constexpr int kAhead = 16;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t warps = std::int64_t{gridDim.x} * kTileWarps;
  for (std::int64_t item = std::int64_t{blockIdx.x} * kTileWarps + threadIdx.x / 32;
       item < count * column_blocks; item += warps) {
    const std::int64_t first = item / column_blocks;
    const std::int64_t id = sorted.key[first];
    if (id == vocabulary || (first > 0 && sorted.key[first - 1] == id)) continue;
    const std::int64_t column = item % column_blocks * 32 + lane;
    const bool inside = column < d;
    float sum = inside ? dweight.load(id, column) : 0.0F;
    for (std::int64_t begin = first;;) {
      // The places of this id among the next 32, which are its own up to the first other.
      const std::int64_t place = begin + lane;
      const bool own = place < count && sorted.key[place] == id;
      const std::int64_t position = own ? sorted.position[place] : 0;
      const int rows = __popc(__ballot_sync(0xffffffffU, own));
      for (int group = 0; group < rows; group += kAhead) {
        float values[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const std::int64_t row = __shfl_sync(0xffffffffU, position, (group + j) % 32);
          values[j] = inside && group + j < rows ? dout.load(row, column) : 0.0F;
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
          if (group + j < rows) sum += values[j];
      }
      if (rows < 32) break;
      begin += 32;
    }
    if (inside) dweight.store(sum, id, column);
  }
}

}  // namespace

void backward_cuda(Context& ctx, const Tensor& ids, const Tensor& dout, const Tensor& dweight) {
  const std::int64_t count = dout.size(0);
  const std::int64_t vocabulary = dweight.size(0);
  const std::int64_t d = dweight.size(1);
  const std::int64_t tiles = (count + kTile - 1) / kTile;
  const Tensor memory = ctx.empty({4, count}, DType::i64);
  const Tensor counts = ctx.empty({kDigits, tiles}, DType::i64);
  auto* const base = memory.data<std::int64_t>();
  auto* const offsets = counts.data<std::int64_t>();
  Keys from{base, base + count};
  Keys to{base + 2 * count, base + 3 * count};
  cuda::launch(ctx, "embedding_backward ids", read_ids, cuda::blocks_for(ctx, count, kThreads), kThreads, 0,
               IndexView(ids), count, vocabulary, from);
  const unsigned grid = cuda::blocks_for(ctx, tiles, 1);
  for (int shift = 0; shift < 63 && (vocabulary >> shift) > 0; shift += kDigitBits) {
    cuda::launch(ctx, "embedding_backward digits", count_digits, grid, kThreads, 0, from, count, shift, tiles,
                 offsets);
    cuda::launch(ctx, "embedding_backward offsets", sum_counts, 1, 1024, 0, offsets, kDigits * tiles);
    cuda::launch(ctx, "embedding_backward sort", move_keys, grid, kThreads, 0, from, to, count, shift, tiles,
                 static_cast<const std::int64_t*>(offsets));
    std::swap(from, to);
  }
  const std::int64_t column_blocks = (d + 31) / 32;
  cuda::launch(ctx, "embedding_backward rows", add_rows,
               cuda::blocks_for(ctx, count * column_blocks, kTileWarps, 64), kThreads, 0, from, count,
               vocabulary, d, column_blocks, AnyView<2>(dout), AnyView<2>(dweight));
}

}  // namespace krait::embedding_detail
