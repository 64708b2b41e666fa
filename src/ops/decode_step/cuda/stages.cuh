// What the stages of a layer share: the eight warps that compute. Along the columns of a matrix each warp has
// an eighth of its own, of which it alone reads the vector, so that between reading a vector and multiplying
// it there is no barrier but that of a norm.
#pragma once

#include "core/cuda/meeting.cuh"
#include "core/cuda/vectors.cuh"
#include "ops/decode_step/cuda/params.h"
#include "ops/decode_step/cuda/ring.cuh"
#include "ops/decode_step/cuda/words.cuh"
#include "ops/linear/cuda/few_rows.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace krait::decode_detail {

// The part of a vector that belongs to a warp.
struct Part {
  int first;  // column
  int quads;
  int padded_quads;  // zeros up to here

  __device__ __forceinline__ Part(int columns, int steps) {
    const int width = steps * kStep;
    first = static_cast<int>(threadIdx.x) / 32 * width;
    quads = max(0, min(width, columns - first)) / 4;
    padded_quads = width / 4;
  }
  // Column of a thread's quad i; whether it has one.
  [[nodiscard]] __device__ int column(int i) const {
    return first + (i * 32 + static_cast<int>(threadIdx.x) % 32) * 4;
  }
  [[nodiscard]] __device__ bool has(int i) const {
    return i * 32 + static_cast<int>(threadIdx.x) % 32 < quads;
  }
};

struct Shared {
  unsigned char* ring;  // of weights
  unsigned char* x;     // the vector that a product reads, in the model's dtype
  float* sums;          // of the warps' parts of a product, two buffers
  unsigned char* low;   // Mamba-1: what x_proj gave, for each warp
  float* scratch;       // [2][kMostGroups][kWarps]
};

// kQuads: of neighbours along a vector of d_model that a thread holds at most; twice as many of d_inner.
template <typename T, int kQuads, bool kPlain>
class Computer {
 public:
  __device__ Computer(const Params& params, const Shared& shared, const Ring& ring)
      : p(params),
        shared_(shared),
        ring_(ring),
        lane(static_cast<int>(threadIdx.x) % 32),
        warp(static_cast<int>(threadIdx.x) / 32) {}

  // What models have as a rule, known when the kernel is compiled: it saves branches where every instruction
  // is waited for.
  [[nodiscard]] __device__ bool rms() const { return kPlain || p.rms; }
  [[nodiscard]] __device__ bool gated_norm() const { return kPlain || p.gated_norm; }
  [[nodiscard]] __device__ bool norm_before_gate() const { return !kPlain && p.norm_before_gate; }
  [[nodiscard]] __device__ int groups() const { return kPlain ? 1 : p.groups; }
  [[nodiscard]] __device__ DType state_dtype() const { return kPlain ? DType::f32 : p.state_dtype; }
  // An operand that plain models have, and one that they lack.
  template <typename Pointer>
  [[nodiscard]] __device__ static bool has(Pointer* operand) {
    return kPlain || operand != nullptr;
  }
  template <typename Pointer>
  [[nodiscard]] __device__ static bool has_extra(Pointer* operand) {
    return !kPlain && operand != nullptr;
  }

  const Params& p;
  const Shared shared_;
  Ring ring_;
  const int lane;
  const int warp;
  int turn = 0;  // of scratch
  int sums_turn = 0;

  // A tile as it lies in the ring, once it is there.
  __device__ __forceinline__ const unsigned char* wait_for_tile(int bytes, unsigned& slot) {
    const Ring::Place place = ring_.next(bytes);
    slot = place.slot;
    cuda::wait_for_phase(ring_.full(place.slot), place.parity);
    return shared_.ring + place.offset;
  }
  __device__ __forceinline__ void release_tile(unsigned slot) const {
    __syncwarp();
    if (lane == 0) cuda::arrive(ring_.empty(slot));
  }

  // Sums over all quads of all warps, in a fixed order.
  __device__ __forceinline__ float sum_up(float v) {
    float* const own = shared_.scratch + turn * kMostGroups * kWarps;
    turn ^= 1;
    v = cuda::warp_sum(v);
    if (lane == 0) own[warp] = v;
    cuda::meet<kThreads>();
    return total(own);
  }
  [[nodiscard]] __device__ static float total(const float* of_warps) {
    static_assert(kWarps == 8);
    const float4 a = reinterpret_cast<const float4*>(of_warps)[0];
    const float4 b = reinterpret_cast<const float4*>(of_warps)[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }

  static constexpr int kInnerQuads = 2 * kQuads;

  // The weight of a norm for this thread's quads, read before there is anything to weigh.
  template <int kMost>
  __device__ __forceinline__ void load_weight(const float* weight, const Part& part,
                                              float4 (&to)[kMost]) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i * 32 >= part.quads) break;
      to[i] = weight != nullptr && part.has(i)
                  ? __ldg(reinterpret_cast<const float4*>(weight + part.column(i)))
                  : float4{1.0F, 1.0F, 1.0F, 1.0F};
    }
  }

  __device__ __forceinline__ void store_quad(const Part& part, int i, uint2 bits) const {
    if (i * 32 + lane < part.padded_quads) *reinterpret_cast<uint2*>(shared_.x + 2 * part.column(i)) = bits;
  }
  [[nodiscard]] __device__ static uint2 bits_of_quad(const float (&v)[4]) {
    return {bits_of<T>(v[0]) | bits_of<T>(v[1]) << 16, bits_of<T>(v[2]) | bits_of<T>(v[3]) << 16};
  }
  // Few quads are taken all, zeros where a warp has less, for the sake of code without branches.
  static constexpr bool kShort = kQuads == 1;

  // A vector that is multiplied as it came.
  template <int kMost>
  __device__ __forceinline__ void stage_plain(const Part& part, const uint2 (&bits)[kMost]) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (!kShort && i * 32 >= part.padded_quads) break;
      store_quad(part, i, bits[i]);
    }
    __syncwarp();
  }

  // residual += what came; its norm is staged for the product.
  __device__ __forceinline__ void stage_norm(const Part& part, const float* norm_bias,
                                             const float4 (&weight)[kQuads], const uint2 (&came)[kQuads],
                                             float (&residual)[kQuads][4]) {
    float sum = 0.0F;
    float square = 0.0F;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!kShort && i * 32 >= part.quads) break;
      float v[4];
      widen<T>(came[i], v);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        residual[i][j] += v[j];
        sum += residual[i][j];
        square = fmaf(residual[i][j], residual[i][j], square);
      }
    }
    const float share = p.model_share;
    float mean = 0.0F;
    if (!rms()) {
      mean = sum_up(sum) * share;
      square = 0.0F;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (!kShort && i * 32 >= part.quads) break;
        if (!part.has(i)) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float v = residual[i][j] - mean;
          square = fmaf(v, v, square);
        }
      }
    }
    const float rstd = rsqrtf(sum_up(square) * share + p.eps);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!kShort && i * 32 >= part.padded_quads) break;
      uint2 bits{0, 0};
      if (part.has(i)) {
        const float w[4] = {weight[i].x, weight[i].y, weight[i].z, weight[i].w};
        float n[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) n[j] = (residual[i][j] - mean) * (rstd * w[j]);
        if (has_extra(norm_bias)) {
#pragma unroll
          for (int j = 0; j < 4; ++j) n[j] += __ldg(norm_bias + part.column(i) + j);
        }
        bits = bits_of_quad(n);
      }
      store_quad(part, i, bits);
    }
    __syncwarp();
  }

  // norm(y silu(z)) or norm(y) silu(z), over groups of channels.
  __device__ __forceinline__ void stage_gated_norm(const Part& part, const float4 (&weight)[kInnerQuads],
                                                   const uint2 (&z_bits)[kInnerQuads],
                                                   const uint2 (&y_bits)[kInnerQuads]) {
    float v[kInnerQuads][4];
    float gate[kInnerQuads][4];
    float square[kInnerQuads];
    float all = 0.0F;
#pragma unroll
    for (int i = 0; i < kInnerQuads; ++i) {
      if (!kShort && i * 32 >= part.quads) break;
      widen<T>(y_bits[i], v[i]);
      widen<T>(z_bits[i], gate[i]);
      square[i] = 0.0F;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        gate[i][j] = cuda::quick_silu(gate[i][j]);
        if (!norm_before_gate()) v[i][j] *= gate[i][j];
        square[i] = fmaf(v[i][j], v[i][j], square[i]);
      }
      all += square[i];
    }
    const int group_size = p.d_inner / groups();
    const float share = p.group_share;
    float* const own = shared_.scratch + turn * kMostGroups * kWarps;
    float rstd = 0.0F;
    if (groups() == 1) {
      rstd = rsqrtf(sum_up(all) * share + p.gated_norm_eps);
    } else {
      turn ^= 1;
      for (int group = 0; group < groups(); ++group) {
        float sum = 0.0F;
#pragma unroll
        for (int i = 0; i < kInnerQuads; ++i) {
          if (!kShort && i * 32 >= part.quads) break;
          if (part.column(i) / group_size == group) sum += square[i];
        }
        sum = cuda::warp_sum(sum);
        if (lane == 0) own[group * kWarps + warp] = sum;
      }
      cuda::meet<kThreads>();
    }
#pragma unroll
    for (int i = 0; i < kInnerQuads; ++i) {
      if (!kShort && i * 32 >= part.padded_quads) break;
      uint2 bits{0, 0};
      if (part.has(i)) {
        if (groups() > 1)
          rstd = rsqrtf(total(own + part.column(i) / group_size * kWarps) * share + p.gated_norm_eps);
        const float w[4] = {weight[i].x, weight[i].y, weight[i].z, weight[i].w};
        float n[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          n[j] = v[i][j] * (rstd * w[j]);
          if (norm_before_gate()) n[j] *= gate[i][j];
        }
        bits = bits_of_quad(n);
      }
      store_quad(part, i, bits);
    }
    __syncwarp();
  }

  // `count` rows of a matrix, on their way through the ring, times the staged vector. finish(row,
  // there, sum) is called by whole warps, a row a lane, neighbours side by side.
  // kOnePass: no more than kMostRows.
  template <bool kOnePass, typename Finish>
  __device__ __forceinline__ void multiply(int columns, int steps, int count, int tile,
                                           const Finish& finish) {
    for (int pass = 0; kOnePass ? pass == 0 : pass < count; pass += kMostRows) {
      const int rows = kOnePass ? count : min(kMostRows, count - pass);
      // Two buffers in turn: whoever writes this one again has passed the barrier of the other.
      float* const buffer = shared_.sums + sums_turn * kWarps * kMostRows;
      sums_turn ^= 1;
#pragma unroll 1
      for (int row = 0; row < rows; row += tile) {
        const int of_tile = min(tile, rows - row);
        float* const to = buffer + warp * kMostRows + row;
        unsigned slot;
        const auto* const weights =
            reinterpret_cast<const T*>(wait_for_tile(of_tile * columns * static_cast<int>(sizeof(T)), slot));
        of_tile <= 8 ? multiply_tile<1>(weights, of_tile, columns, steps, to)
                     : multiply_tile<4>(weights, of_tile, columns, steps, to);
        release_tile(slot);
      }
      cuda::meet<kThreads>();
      const int row = static_cast<int>(threadIdx.x);
      if (warp * 32 < rows) {
        const bool there = row < rows;
        const float* const of_row = buffer + min(row, kMostRows - 1);
        float part[kWarps];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) part[w] = of_row[w * kMostRows];
        finish(pass + row, there,
               ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])));
      }
    }
  }

 private:
  // Eight rows at a time, on tensor cores, with weights in the place of their left operand. A lane's 16 bytes
  // of a row fill the whole of it: what the product takes for rows g and g + 8 are two halves of row g,
  // multiplied with columns of their own in which the right operand has the matching halves of the vector.
  // Lanes of odd rows are one step of 64 bytes ahead of those of even ones, for the sake of the banks, and
  // have a second pair of columns for that.
  template <int kRowGroups>
  __device__ __forceinline__ void multiply_tile(const T* weights, int rows, int columns, int steps,
                                                float* to) const {
    constexpr int kChains = kRowGroups == 1 ? 2 : 1;  // of products that wait for one another
    const int g = lane / 4;
    const int mine = warp * steps * kStep + lane % 4 * 8;
    const auto* const x = reinterpret_cast<const unsigned*>(shared_.x) + mine / 2 + g % 2;
    const T* from[kRowGroups];
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) from[j] = weights + min(j * 8 + g, rows - 1) * columns + mine;
    float c[kRowGroups][kChains][4] = {};
    const auto step_of = [&](int s, int ahead) { return s + ahead == steps ? 0 : (s + ahead) * kStep; };
#pragma unroll 2
    for (int s = 0; s < steps; s += kChains) {
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) {
        if (chain > 0 && s + chain >= steps) break;
        const int x_step = step_of(s + chain, g / 2);
        unsigned x0 = 0;
        unsigned x1 = 0;
        if (lane < 16) {
          x0 = x[x_step / 2];
          x1 = x[x_step / 2 + 2];
        }
        const int step = step_of(s + chain, g % 2);
        const bool inside = kPlain || mine + step < columns;
#pragma unroll
        for (int j = 0; j < kRowGroups; ++j) {
          const uint4 w = inside ? *reinterpret_cast<const uint4*>(from[j] + step) : uint4{0, 0, 0, 0};
          linear_detail::multiply_step<T>(c[j][chain], w.x, w.y, w.z, w.w, x0, x1);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) {
      float sum = c[j][0][0] + c[j][0][3];
      if constexpr (kChains == 2) sum += c[j][1][0] + c[j][1][3];
      if (lane % 4 == g % 2 && j * 8 + g < rows) to[j * 8 + g] = sum;
    }
  }
};

}  // namespace krait::decode_detail

#endif
