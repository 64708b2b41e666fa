// The warpgroup that prepares chunks in the persistent forward: copies of x, B and C some chunks ahead, the
// sums of exponents, and C B^T.
#pragma once

#include "core/cuda/async_copy.cuh"
#include "ops/ssd/cuda/persistent.cuh"

#ifdef KRAIT_WGMMA

namespace krait::ssd_detail {

// Rows of tokens [begin, begin + kTokens) of a segment, into panels.
template <int kColumns, typename T>
__device__ __forceinline__ void load_panels(unsigned tile, const T* from, std::int64_t token_stride,
                                            std::int64_t columns, const Segments& chunks,
                                            const Segment& segment, std::int64_t begin) {
  constexpr int kVectors = kColumns / 8;
  constexpr int kRows = kWarpgroup / kVectors;  // at a time
  static_assert(kRows % 8 == 0, "the vectors of a thread lie alike in their rows");
  const int first = static_cast<int>(threadIdx.x) % kWarpgroup / kVectors;
  const int vector = static_cast<int>(threadIdx.x) % kVectors;
  const bool inside = vector * 8 < columns;
  const unsigned to = tile + Panel::offset(first, vector);
  from += inside ? vector * 8 : 0;
  if (segment.listed < 0) {
    const T* source = from + (segment.start + (begin + first) * segment.step) * token_stride;
    const std::int64_t jump = kRows * segment.step * token_stride;
#pragma unroll
    for (int row = 0; row < kTokens; row += kRows) {
      const bool there = inside && begin + first + row < segment.count;
      copy_async(to + static_cast<unsigned>(row * 128), there ? source : from, there);
      source += jump;
    }
  } else {
#pragma unroll 1
    for (int row = 0; row < kTokens; row += kRows) {
      const std::int64_t i = begin + first + row;
      const bool there = inside && i < segment.count;
      copy_async(to + static_cast<unsigned>(row * 128),
                 there ? from + chunks.positions[segment.listed + i] * token_stride : from, there);
    }
  }
}

// Sums over a chunk of what its tokens have: d and the exponent.
template <typename T>
__device__ __forceinline__ void compute_factors(const float2 (&step)[2], int lane, Factors& factors) {
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
  const float end = factors_separate<T>(last) ? 0.0F : last;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factors.a[lane + i * 32] = a[i];
    factors.d[lane + i * 32] = step[i].x;
    factors.start[lane + i * 32] = exp2_fast(a[i]);
    factors.left[lane + i * 32] = step[i].x * exp2_fast(end - a[i]);
  }
}

// kMaps: tiles are copied by one thread, and each stage's barrier `loaded` says when they are there; else by
// all of the warpgroup, which each waits for its own.
template <typename T, int kN, bool kMaps>
__device__ __forceinline__ void produce(const Inputs& in, const Segments& chunks, Parts<FirstChunk> parts,
                                        const Maps& maps, char* memory, unsigned shared,
                                        const Barriers& barriers) {
  using At = Layout<kN>;
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;

  Part part;
  bool more = parts.next(part);
  bool begins = true;  // a part
  int begin = 0;       // of the chunk to copy, in its part
  int issued = 0;
  unsigned with_outputs = 0;  // of the chunks issued, the last one in bit 0
  Segment segment;
  TileOf tiles[2] = {TileOf(in, 0, 0), TileOf(in, 0, 1)};
  // A token a thread, of the tile `warp / 2`, in the chunk issued last.
  const int token = warp % 2 * 32 + lane;
  unsigned dt = 0;
  float bias = 0.0F;
  float rate = 0.0F;
  int rest = -1;
  std::int64_t next_dt = 0;
  std::int64_t jump_dt = 0;
  float2* const steps = reinterpret_cast<float2*>(memory + At::steps);
  const auto steps_of = [&](int k, int which) { return steps + (k % kStages * 2 + which) * kTokens; };

  // Begins the copies of the next chunk, and keeps the steps of the one before.
  const auto issue = [&] {
    if (rest >= 0) {
      const Step step = step_from(in, value_of(dt, in.dt.dtype), bias, rate);
      const float exponent = step.exponent < kLeastExponent ? kLeastExponent : step.exponent;
      steps_of(issued - 1, warp / 2)[token] =
          token < rest ? make_float2(step.d, exponent * kLog2e) : make_float2(0.0F, 0.0F);
    }
    rest = -1;
    if (more) {
      if (begins) {
        begins = false;
        segment = segment_of(chunks, part);
        tiles[0] = TileOf(in, part.pair, 0);
        tiles[1] = TileOf(in, part.pair, 1);
        const std::int64_t head = warp < 2 ? tiles[0].head : tiles[1].head;
        bias = bias_of(in, head);
        rate = rate_of(in, head);
        next_dt = in.dt.offset(segment.row, segment.start + token * segment.step, head);
        jump_dt = segment.step * kTokens * in.dt.stride[1];
      }
      const int stage = issued % kStages;
      const unsigned at = shared + static_cast<unsigned>(stage * At::stage);
      rest = static_cast<int>(segment.count) - begin;
      if (segment.listed < 0) {
        if (token < rest) dt = load_bits(in.dt, next_dt);
        next_dt += jump_dt;
      } else if (token < rest) {
        dt = load_bits(in.dt, in.dt.offset(segment.row, chunks.positions[segment.listed + begin + token],
                                           warp < 2 ? tiles[0].head : tiles[1].head));
      }
      if (issued >= kStages) cuda::wait_for_phase(barriers.empty(stage), (issued / kStages + 1) % 2);
      if constexpr (kMaps) {
        if (threadIdx.x == 0) {
          const unsigned loaded = barriers.loaded(stage);
          const int l = static_cast<int>(segment.start) + begin;
          const int b = static_cast<int>(segment.row);
          const int group = static_cast<int>(tiles[0].group);
          cuda::arrive_expecting(loaded, 2 * kTile + (part.outputs ? 2 : 1) * At::kRowsOfN);
#pragma unroll
          for (int which = 0; which < 2; ++which)
            cuda::copy_tile_async(at + static_cast<unsigned>(At::x + which * kTile), maps.x,
                                  static_cast<int>(tiles[which].channel0),
                                  static_cast<int>(tiles[which].head), l, b, loaded);
#pragma unroll
          for (int panel = 0; panel < kN / 64; ++panel) {
            const auto to = at + static_cast<unsigned>(panel * Panel::kPanel);
            cuda::copy_tile_async(to + At::B, maps.B, panel * 64, group, l, b, loaded);
            if (part.outputs) cuda::copy_tile_async(to + At::C, maps.C, panel * 64, group, l, b, loaded);
          }
        }
        __syncwarp();
      } else {
        const auto rows_of = [&](const AnyView<4>& view, std::int64_t of, std::int64_t column) {
          return static_cast<const T*>(view.data) + view.offset(segment.row, 0, of, column);
        };
#pragma unroll
        for (int which = 0; which < 2; ++which)
          load_panels<kChannels>(at + static_cast<unsigned>(At::x + which * kTile),
                                 rows_of(in.x, tiles[which].head, tiles[which].channel0), in.x.stride[1],
                                 kChannels, chunks, segment, begin);
        load_panels<kN>(at + At::B, rows_of(in.B, tiles[0].group, 0), in.B.stride[1], in.d_state, chunks,
                        segment, begin);
        if (part.outputs)
          load_panels<kN>(at + At::C, rows_of(in.C, tiles[0].group, 0), in.C.stride[1], in.d_state, chunks,
                          segment, begin);
      }
      with_outputs = with_outputs << 1 | (part.outputs ? 1U : 0U);
      ++issued;
      begin += kTokens;
      if (begin >= part.count * kTokens) {
        begin = 0;
        begins = true;
        more = parts.next(part);
      }
    }
    if constexpr (!kMaps) cuda::commit_copies();
  };

#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) issue();
#pragma unroll 1
  for (int k = 0; k < issued; ++k) {
    const int stage = k % kStages;
    const int now = afresh(lane);
    if constexpr (!kMaps) {
      cuda::wait_for_copies<kAhead - 1>();
      cuda::fence_shared();
    }
    sync_warpgroup(0);
    if constexpr (kMaps) cuda::wait_for_phase(barriers.loaded(stage), k / kStages % 2);
    const unsigned at = shared + static_cast<unsigned>(stage * At::stage);
    const bool outputs = (with_outputs >> (issued - 1 - k) & 1) != 0;
    // Where there are no outputs, of what an earlier chunk has left: nobody reads it.
    float pairs[kTokens / 8][4];
    cuda::fence_sums();
#pragma unroll
    for (int n = 0; n < kN; n += 16)
      cuda::multiply_add_async<T, Operand::along_depth, Operand::along_depth>(
          pairs, cuda::describe<kTokens, Operand::along_depth>(at + At::C, 0, n),
          cuda::describe<kTokens, Operand::along_depth>(at + At::B, 0, n), n > 0);
    cuda::commit_products();
    issue();
    // The factors and C B^T of the chunk before the last one have been read.
    if (k > 1) cuda::wait_for_phase(barriers.empty((k - 2) % kStages), (k - 2) / kStages % 2);
    if (warp < 2) {
      const float2 step[2] = {steps_of(k, warp)[now], steps_of(k, warp)[now + 32]};
      compute_factors<T>(step, now, reinterpret_cast<Factors*>(memory + At::factors)[k % 2 * 2 + warp]);
    }
    cuda::wait_for_products<0>();
    cuda::keep_registers(pairs);
    if (outputs) {
      const unsigned to = shared + static_cast<unsigned>(At::pairs + k % 2 * kTile);
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        if (j > warp) continue;
        unsigned v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = pack<T>(pairs[2 * j + i / 2][i % 2 * 2], pairs[2 * j + i / 2][i % 2 * 2 + 1]);
          // What is above the diagonal.
          const int row = now / 4 + i % 2 * 8;
          const int column = now % 4 * 2 + i / 2 * 8;
          if (j == warp) v[i] &= (column <= row ? 0xffffU : 0U) | (column < row ? 0xffff0000U : 0U);
        }
        store_matrices<false>(to + Panel::offset(warp * 16 + now % 16, 2 * j + now / 16), v);
      }
      cuda::fence_shared();
    }
    cuda::arrive(barriers.full(stage));
  }
}

}  // namespace krait::ssd_detail

#endif  // KRAIT_WGMMA
