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
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    factors.a[lane + i * 32] = a[i];
    factors.d[lane + i * 32] = step[i].x;
    factors.start[lane + i * 32] = exp2_fast(a[i]);
    factors.left[lane + i * 32] = step[i].x * exp2_fast(last - a[i]);
  }
}

template <typename T, int kN>
__device__ __forceinline__ void produce(const Inputs& in, const Segments& chunks, Parts<FirstChunk> parts,
                                        char* memory, unsigned shared, const Barriers& barriers) {
  using At = Layout<kN>;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  Part part;
  bool more = parts.next(part);
  bool begins = true;      // a part
  std::int64_t begin = 0;  // of the chunk to copy, in its part
  int issued = 0;
  unsigned with_outputs = 0;  // of the chunks issued, the last one in bit 0
  Segment segment;
  std::int64_t head = 0;
  const T* x[2] = {};
  const T* B = nullptr;
  const T* C = nullptr;
  // Of warps 0 and 1: two tokens a lane of the tile of that number, in the chunk issued last.
  float dt[2] = {};
  float bias = 0.0F;
  float rate = 0.0F;
  std::int64_t rest = 0;
  float2* const steps = reinterpret_cast<float2*>(memory + At::steps);
  const auto steps_of = [&](int k, int i) -> float2& {
    return steps[((k % kStages) * 2 + warp) * kTokens + lane + i * 32];
  };

  // Begins the copies of the next chunk, and keeps the steps of the one before.
  const auto issue = [&] {
    if (issued > 0 && rest >= 0 && warp < 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool inside = lane + i * 32 < rest;
        const Step step = step_from(in, dt[i], bias, rate);
        const float exponent = step.exponent < kLeastExponent ? kLeastExponent : step.exponent;
        steps_of(issued - 1, i) = inside ? make_float2(step.d, exponent * kLog2e) : make_float2(0.0F, 0.0F);
      }
    }
    rest = -1;
    if (more) {
      if (begins) {
        begins = false;
        segment = segment_of(chunks, part);
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          const TileOf tile(in, part.pair, which);
          x[which] = static_cast<const T*>(in.x.data) + in.x.offset(segment.row, 0, tile.head, tile.channel0);
          if (which == 0) {
            B = static_cast<const T*>(in.B.data) + in.B.offset(segment.row, 0, tile.group, 0);
            C = static_cast<const T*>(in.C.data) + in.C.offset(segment.row, 0, tile.group, 0);
          }
          if (which == warp) {
            head = tile.head;
            bias = bias_of(in, head);
            rate = rate_of(in, head);
          }
        }
      }
      const int stage = issued % kStages;
      const unsigned at = shared + static_cast<unsigned>(stage * At::stage);
      if (issued >= kStages) cuda::wait_for_phase(barriers.empty(stage), (issued / kStages + 1) % 2);
      load_panels<kChannels>(at + At::x, x[0], in.x.stride[1], kChannels, chunks, segment, begin);
      load_panels<kChannels>(at + At::x + kTile, x[1], in.x.stride[1], kChannels, chunks, segment, begin);
      load_panels<kN>(at + At::B, B, in.B.stride[1], in.d_state, chunks, segment, begin);
      if (part.outputs) load_panels<kN>(at + At::C, C, in.C.stride[1], in.d_state, chunks, segment, begin);
      if (warp < 2) load_dt(in, chunks, segment, head, begin, lane, dt);
      rest = segment.count - begin;
      with_outputs = with_outputs << 1 | (part.outputs ? 1U : 0U);
      ++issued;
      begin += kTokens;
      if (begin >= part.count * kTokens) {
        begin = 0;
        begins = true;
        more = parts.next(part);
      }
    }
    cuda::commit_copies();
  };

#pragma unroll 1
  for (int i = 0; i < kAhead; ++i) issue();
#pragma unroll 1
  for (int k = 0;; ++k) {
    issue();
    if (k >= issued) break;
    cuda::wait_for_copies<kAhead>();
    cuda::fence_shared();
    sync_warpgroup(0);
    const int stage = k % kStages;
    const unsigned at = shared + static_cast<unsigned>(stage * At::stage);
    const bool outputs = (with_outputs >> (issued - 1 - k) & 1) != 0;
    const auto sum_exponents = [&] {
      // With C B^T of the chunk before, the factors of the one before that have been read.
      if (k > 0) cuda::wait_for_phase(barriers.pairs_free(), (k - 1) % 2);
      if (warp < 2) {
        const float2 step[2] = {steps_of(k, 0), steps_of(k, 1)};
        compute_factors(step, lane, reinterpret_cast<Factors*>(memory + At::factors)[k % 2 * 2 + warp]);
      }
    };
    if (outputs) {
      float pairs[kTokens / 8][4];
      cuda::fence_sums();
#pragma unroll
      for (int n = 0; n < kN; n += 16)
        cuda::multiply_add_async<T, Operand::along_depth, Operand::along_depth>(
            pairs, cuda::describe<kTokens, Operand::along_depth>(at + At::C, 0, n),
            cuda::describe<kTokens, Operand::along_depth>(at + At::B, 0, n), n > 0);
      cuda::commit_products();
      cuda::wait_for_products<0>();
      cuda::keep_registers(pairs);
      sum_exponents();
#pragma unroll
      for (int j = 0; j < kTokens / 8; j += 2) {
        const unsigned v[4] = {pack<T>(pairs[j][0], pairs[j][1]), pack<T>(pairs[j][2], pairs[j][3]),
                               pack<T>(pairs[j + 1][0], pairs[j + 1][1]),
                               pack<T>(pairs[j + 1][2], pairs[j + 1][3])};
        store_matrices<false>(shared + At::pairs + Panel::offset(warp * 16 + lane % 16, j + lane / 16), v);
      }
    } else {
      sum_exponents();
    }
    cuda::arrive(barriers.full(stage));
  }
}

}  // namespace krait::ssd_detail

#endif  // KRAIT_WGMMA
