// The warps that prepare chunks in the persistent forward, as far ahead of those that have states as there is
// place: some copy x, B and C, two have the factors, each those of one tile, and a warpgroup makes C B^T.
#pragma once

#include "core/cuda/async_copy.cuh"
#include "ops/ssd/cuda/persistent.cuh"

#ifdef KRAIT_WGMMA

namespace krait::ssd_detail {

inline constexpr int kCopyingWarps = 2;  // where tiles are copied by rows

// Rows of tokens [begin, begin + kTokens) of a segment, into a panel of 64 columns.
template <typename T>
__device__ __forceinline__ void load_panel(unsigned tile, const T* from, std::int64_t token_stride,
                                           std::int64_t columns, const Segments& chunks,
                                           const Segment& segment, std::int64_t begin, int thread) {
  constexpr int kVectors = 8;
  constexpr int kRows = kCopyingWarps * 32 / kVectors;  // at a time
  static_assert(kRows % 8 == 0, "the vectors of a thread lie alike in their rows");
  const int first = thread / kVectors;
  const int vector = thread % kVectors;
  const bool inside = vector * 8 < columns;
  const unsigned to = tile + Panel::offset(first, vector);
  from += inside ? vector * 8 : 0;
#pragma unroll 4
  for (int row = 0; row < kTokens; row += kRows) {
    const std::int64_t i = begin + first + row;
    const bool there = inside && i < segment.count;
    copy_async(to + static_cast<unsigned>(row * 128),
               there ? from + chunks.position(segment, i) * token_stride : from, there);
  }
}

// A stage is empty again before chunk k.
__device__ __forceinline__ void wait_for_place(const Barriers& barriers, unsigned k) {
  if (k < kStages) return;
  cuda::wait_for_phase(barriers.empty(stage_of(k)), phase_of(k) ^ 1U);
  cuda::wait_for_phase(barriers.stored(stage_of(k)), phase_of(k) ^ 1U);
}

// By one thread. x and outputs pass by once and leave the second-level cache to B and C, which other blocks
// read, too.
template <int kN>
__device__ __forceinline__ void copy_tiles(const Inputs& in, const Segments& chunks, Parts<FirstChunk> parts,
                                           const Maps& maps, unsigned shared, const Barriers& barriers) {
  using At = Layout<kN>;
  const std::uint64_t policy = cuda::evict_first();
  unsigned k = 0;
  Part part;
  while (parts.next(part)) {
    const Segment segment = segment_of(chunks, part);
    const TileOf tiles[2] = {TileOf(in, part.pair, 0), TileOf(in, part.pair, 1)};
    const int row = static_cast<int>(segment.row);
    const int group = static_cast<int>(tiles[0].group);
    int token = static_cast<int>(segment.start);
#pragma unroll 1
    for (int i = 0; i < part.count; ++i) {
      const unsigned at = shared + static_cast<unsigned>(stage_of(k) * At::stage);
      const unsigned loaded = barriers.loaded(stage_of(k));
      wait_for_place(barriers, k);
      cuda::arrive_expecting(loaded, 2 * kTile + (part.outputs ? 2 : 1) * At::kRowsOfN);
#pragma unroll
      for (int which = 0; which < 2; ++which)
        cuda::copy_tile_async(at + static_cast<unsigned>(At::x + which * kTile), maps.x,
                              static_cast<int>(tiles[which].channel0), static_cast<int>(tiles[which].head),
                              token, row, loaded, policy);
#pragma unroll
      for (int panel = 0; panel < kN / 64; ++panel) {
        const auto to = at + static_cast<unsigned>(panel * Panel::kPanel);
        cuda::copy_tile_async(to + At::B, maps.B, panel * 64, group, token, row, loaded);
        if (part.outputs) cuda::copy_tile_async(to + At::C, maps.C, panel * 64, group, token, row, loaded);
      }
      token += kTokens;
      ++k;
    }
  }
}

// Outputs to memory, by one thread.
template <int kN>
__device__ __forceinline__ void store_tiles(const Inputs& in, const Segments& chunks, Parts<FirstChunk> parts,
                                            const Maps& maps, unsigned shared, const Barriers& barriers) {
  using At = Layout<kN>;
  const std::uint64_t policy = cuda::evict_first();
  unsigned k = 0;
  Part part;
  while (parts.next(part)) {
    const Segment segment = segment_of(chunks, part);
    const TileOf tiles[2] = {TileOf(in, part.pair, 0), TileOf(in, part.pair, 1)};
    const int row = static_cast<int>(segment.row);
    int token = static_cast<int>(segment.start);
#pragma unroll 1
    for (int i = 0; i < part.count; ++i) {
      const unsigned x = shared + static_cast<unsigned>(stage_of(k) * At::stage + At::x);
      cuda::wait_for_phase(barriers.written(stage_of(k)), phase_of(k));
      if (part.outputs) {
#pragma unroll
        for (int which = 0; which < 2; ++which)
          if (tiles[which].own)
            cuda::store_tile_async(maps.out, static_cast<int>(tiles[which].channel0),
                                   static_cast<int>(tiles[which].head), token, row,
                                   x + static_cast<unsigned>(which * kTile), policy);
        cuda::wait_for_stored_tiles();
      }
      cuda::arrive(barriers.stored(stage_of(k)));
      token += kTokens;
      ++k;
    }
  }
}

// By kCopyingWarps warps, of which this is `own`.
template <typename T, int kN>
__device__ __forceinline__ void copy_rows(const Inputs& in, const Segments& chunks, Parts<FirstChunk> parts,
                                          int own, unsigned shared, const Barriers& barriers) {
  using At = Layout<kN>;
  constexpr unsigned kRunning = 2;  // chunks whose copies are waited for later
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int thread = own * 32 + lane;
  unsigned k = 0;
  Part part;
  while (parts.next(part)) {
    const Segment segment = segment_of(chunks, part);
    const TileOf tiles[2] = {TileOf(in, part.pair, 0), TileOf(in, part.pair, 1)};
    const auto rows_of = [&](const AnyView<4>& view, std::int64_t of, std::int64_t column) {
      return static_cast<const T*>(view.data) + view.offset(segment.row, 0, of, column);
    };
#pragma unroll 1
    for (int i = 0; i < part.count; ++i) {
      const unsigned at = shared + static_cast<unsigned>(stage_of(k) * At::stage);
      const std::int64_t begin = std::int64_t{i} * kTokens;
      wait_for_place(barriers, k);
#pragma unroll
      for (int which = 0; which < 2; ++which)
        load_panel(at + static_cast<unsigned>(At::x + which * kTile),
                   rows_of(in.x, tiles[which].head, tiles[which].channel0), in.x.stride[1], kChannels, chunks,
                   segment, begin, thread);
#pragma unroll
      for (int panel = 0; panel < kN / 64; ++panel) {
        const auto to = at + static_cast<unsigned>(panel * Panel::kPanel);
        load_panel(to + At::B, rows_of(in.B, tiles[0].group, panel * 64), in.B.stride[1],
                   in.d_state - panel * 64, chunks, segment, begin, thread);
        if (part.outputs)
          load_panel(to + At::C, rows_of(in.C, tiles[0].group, panel * 64), in.C.stride[1],
                     in.d_state - panel * 64, chunks, segment, begin, thread);
      }
      cuda::commit_copies();
      if (k >= kRunning) {
        cuda::wait_for_copies<kRunning>();
        cuda::fence_shared();
        cuda::arrive_of_warp(barriers.loaded(stage_of(k - kRunning)), lane);
      }
      ++k;
    }
  }
  cuda::wait_for_copies<0>();
  cuda::fence_shared();
  for (unsigned last = k < kRunning ? 0 : k - kRunning; last < k; ++last)
    cuda::arrive_of_warp(barriers.loaded(stage_of(last)), lane);
}

// Sums over a chunk of what its tokens have: d and the exponent. `pending` as in Factors, before the chunk
// and then after it.
template <typename T>
__device__ __forceinline__ void compute_factors(const float2 (&step)[2], int lane, float& pending,
                                                Factors& factors) {
  float a[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i] = step[i].y;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const float other = __shfl_up_sync(0xffffffffU, a[i], distance);
      if (lane >= distance) a[i] += other;
    }
  }
  a[1] += __shfl_sync(0xffffffffU, a[0], 31);
  const float last = __shfl_sync(0xffffffffU, a[1], 31);
  const float total = pending + last;
  const bool separate = factors_separate<T>(total);
  const bool scales = !separate || total < -kMostPending;
  const float end = separate ? -pending : last;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factors.a[lane + i * 32] = a[i];
    factors.d[lane + i * 32] = step[i].x;
    factors.start[lane + i * 32] = exp2_fast(pending + a[i]);
    factors.left[lane + i * 32] = step[i].x * exp2_fast(end - a[i]);
  }
  __syncwarp();
  float* const pair = &factors.left[lane * 2];
  *reinterpret_cast<PairFactor<T>*>(pair) = PairFactor<T>(pair[0], pair[1]);
  pending = scales ? 0.0F : total;
  if (lane == 0)
    factors.whole = {.last = last,
                     .scale = scales ? exp2_fast(total) : 1.0F,
                     .rest = exp2_fast(pending),
                     .way = !separate ? 0
                            : scales  ? 2
                                      : 1};
}

// d and exponents (in powers of two) of two tokens of the lane, those before `rest`. What depends on the
// operator's options is asked once for both, so that they are computed side by side.
__device__ __forceinline__ void steps_of(const Inputs& in, const unsigned (&dt)[2], float bias, float rate,
                                         int rest, int lane, float2 (&step)[2]) {
  float d[2];
  if (in.dt.dtype == DType::f32) {
    for (int i = 0; i < 2; ++i) d[i] = value_of(dt[i], DType::f32);
  } else if (in.dt.dtype == DType::bf16) {
    for (int i = 0; i < 2; ++i) d[i] = value_of(dt[i], DType::bf16);
  } else {
    for (int i = 0; i < 2; ++i) d[i] = value_of(dt[i], DType::f16);
  }
  float exponent[2] = {d[0], d[1]};
  if (in.discrete) {
    d[0] = d[1] = 1.0F;
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) d[i] += bias;
    if (in.dt_softplus) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float v = d[i] > 20.0F ? 20.0F : d[i];
        const float soft = log1pf(expf(v));
        d[i] = d[i] > 20.0F ? d[i] : soft;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      d[i] = d[i] < in.low ? in.low : d[i] > in.high ? in.high : d[i];  // NaN is neither
      exponent[i] = d[i] * rate;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float kept = exponent[i] < kLeastExponent ? kLeastExponent : exponent[i];
    const bool inside = lane + i * 32 < rest;
    step[i] = make_float2(inside ? d[i] : 0.0F, inside ? kept * kLog2E : 0.0F);
  }
}

// By a warp, of tile `which`.
template <typename T>
__device__ __forceinline__ void prepare_factors(const Inputs& in, const Segments& chunks,
                                                Parts<FirstChunk> parts, int which, char* factors,
                                                const Barriers& barriers) {
  // Of a chunk: of each of the lane's tokens its dt, loads that are begun two chunks ahead.
  struct Ahead {
    unsigned dt[2] = {};
    float bias = 0.0F;
    float rate = 0.0F;
    int rest = 0;        // tokens from the chunk's begin on
    bool first = false;  // of its part
    bool there = false;
  };
  const int lane = static_cast<int>(threadIdx.x % 32);
  Part part;
  Segment segment;
  std::int64_t head = 0;
  std::int64_t next = 0;  // where the lane's next dt lies, if positions are not listed
  float bias = 0.0F;
  float rate = 0.0F;
  int begun = 0;  // chunks of the part
  bool more = parts.next(part);
  const auto begin = [&](Ahead& chunk) {
    chunk.there = more;
    if (!more) return;
    chunk.first = begun == 0;
    if (chunk.first) {
      segment = segment_of(chunks, part);
      head = TileOf(in, part.pair, which).head;
      bias = bias_of(in, head);
      rate = rate_of(in, head);
      next = in.dt.offset(segment.row, segment.start + lane * segment.step, head);
    }
    chunk.bias = bias;
    chunk.rate = rate;
    chunk.rest = static_cast<int>(segment.count) - begun * kTokens;
    const std::int64_t jump = segment.step * 32 * in.dt.stride[1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = lane + i * 32;
      if (segment.listed >= 0 && token < chunk.rest)
        next = in.dt.offset(segment.row, chunks.positions[segment.listed + begun * kTokens + token], head);
      if (token < chunk.rest) chunk.dt[i] = load_bits(in.dt, next);
      next += jump;
    }
    if (++begun == part.count) {
      begun = 0;
      more = parts.next(part);
    }
  };
  // The chunk that is prepared and the two after it.
  Ahead ahead[3];
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    ahead[1] = ahead[2];
    begin(ahead[2]);
  }
  float pending = 0.0F;
#pragma unroll 1
  for (unsigned k = 0; ahead[1].there; ++k) {
    ahead[0] = ahead[1];
    ahead[1] = ahead[2];
    begin(ahead[2]);
    float2 step[2];
    steps_of(in, ahead[0].dt, ahead[0].bias, ahead[0].rate, ahead[0].rest, lane, step);
    if (ahead[0].first) pending = 0.0F;
    if (k >= kStages) cuda::wait_for_phase(barriers.empty(stage_of(k)), phase_of(k) ^ 1U);
    compute_factors<T>(step, lane, pending, reinterpret_cast<Factors*>(factors)[stage_of(k) * 2 + which]);
    cuda::arrive_of_warp(barriers.factored(stage_of(k)), lane);
  }
}

// C B^T of each chunk that has outputs; of the others only that they have been loaded.
template <typename T, int kN>
__device__ __forceinline__ void multiply_pairs(Parts<FirstChunk> parts, unsigned shared,
                                               const Barriers& barriers) {
  using At = Layout<kN>;
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) % kWarpgroup / 32, 0);
  const int lane = static_cast<int>(threadIdx.x % 32);
  unsigned k = 0;
  Part part;
  while (parts.next(part)) {
#pragma unroll 1
    for (int i = 0; i < part.count; ++i, ++k) {
      const int stage = __shfl_sync(0xffffffffU, stage_of(k), 0);
      const unsigned at = shared + static_cast<unsigned>(stage * At::stage);
      cuda::wait_for_phase(barriers.loaded(stage), phase_of(k));
      if (!part.outputs) {
        cuda::arrive_of_warp(barriers.paired(stage), lane);
        continue;
      }
      float pairs[kTokens / 8][4];
      const TileOperand<Operand::along_depth> B(shared + At::B, at - shared);
      const TileOperand<Operand::along_depth> C(shared + At::C, at - shared);
      cuda::fence_sums();
#pragma unroll
      for (int n = 0; n < kN; n += 16)
        cuda::multiply_add_async<T, Operand::along_depth, Operand::along_depth>(pairs, C.at(0, n), B.at(0, n),
                                                                                n > 0);
      cuda::commit_products();
      // That of the chunk before the last one has been read.
      if (k > 1) cuda::wait_for_phase(barriers.empty(stage_of(k - 2)), phase_of(k - 2));
      cuda::wait_for_products<0>();
      cuda::keep_registers(pairs);
      const unsigned to = shared + static_cast<unsigned>(At::pairs + stage % 2 * kTile);
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        if (j > warp) continue;
        unsigned v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = pack<T>(pairs[2 * j + i / 2][i % 2 * 2], pairs[2 * j + i / 2][i % 2 * 2 + 1]);
          // What is above the diagonal.
          const int row = lane / 4 + i % 2 * 8;
          const int column = lane % 4 * 2 + i / 2 * 8;
          if (j == warp) v[i] &= (column <= row ? 0xffffU : 0U) | (column < row ? 0xffff0000U : 0U);
        }
        store_matrices<false>(to + Panel::offset(warp * 16 + lane % 16, 2 * j + lane / 16), v);
      }
      cuda::fence_shared();
      cuda::arrive_of_warp(barriers.paired(stage), lane);
    }
  }
}

}  // namespace krait::ssd_detail

#endif  // KRAIT_WGMMA
