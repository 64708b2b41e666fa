// What the stages of a layer share: the eight warps that compute. Along the columns of a matrix each warp has
// an eighth of its own, of which it alone reads the vector, so that between reading a vector and multiplying
// it there is no barrier but that of a norm.
#pragma once

#include "core/cuda/meeting.cuh"
#include "core/cuda/vectors.cuh"
#include "ops/decode_step/cuda/params.h"
#include "ops/decode_step/cuda/ring.cuh"
#include "ops/decode_step/cuda/shared.cuh"
#include "ops/decode_step/cuda/words.cuh"
#include "ops/linear/cuda/few_rows.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace krait::decode_detail {

// The part of a vector that belongs to a warp.
struct Part {
  int first;  // column
  int quads;
  int padded_quads;  // zeros up to here
  unsigned stage;    // address in shared memory of the thread's first quad

  // Column of a thread's quad i; whether it has one.
  [[nodiscard]] __device__ int column(int i) const {
    return first + (i * 32 + static_cast<int>(threadIdx.x) % 32) * 4;
  }
  [[nodiscard]] __device__ bool has(int i) const {
    return i * 32 + static_cast<int>(threadIdx.x) % 32 < quads;
  }
};

// Addresses in shared memory.
struct Shared {
  unsigned x;     // the vector that a product reads, in the model's dtype: of four words the second and the
                  // third have changed places
  unsigned sums;  // of the warps' parts of a product, two buffers
  unsigned scratch;     // floats [2][kMostGroups][kWarps]
  unsigned low;         // what all channels of the block need: what x_proj gave, or B, C and the heads' steps
  unsigned char* ring;  // of weights
};

// What a thread adds to addresses for a matrix of so many columns: along them a warp has `steps` of 64 bytes.
struct Along {
  unsigned weight;  // of a row; lanes of odd rows are one step ahead
  unsigned fours;   // of one of four rows: lanes of the other four rows have the other step of two
  unsigned x;       // address
  unsigned stage;   // address of the thread's first four values
};

// kSteps: of a warp along d_model, in models whose sizes and options are known when the kernel is compiled
// (is_known); 0 of all others. What is known saves branches and addresses where every instruction is waited
// for.
template <typename T, int kSteps>
class Computer {
 public:
  static constexpr bool kKnown = kSteps > 0;
  // Four neighbours along a vector of d_model or d_inner that a thread holds.
  static constexpr int kQuads =
      (kKnown ? kSteps * kWarps * kStep : kMostModel) / kQuadColumns + (kKnown && kSteps % 4 != 0 ? 1 : 0);
  static constexpr int kInnerQuads = (kKnown ? 2 * kSteps * kWarps * kStep : kMostInner) / kQuadColumns +
                                     (kKnown && kSteps % 2 != 0 ? 1 : 0);

  __device__ Computer(const Params& params, const Shared& shared, const Ring& ring)
      : p(params),
        shared_(shared),
        ring_(ring),
        own(shared.sums + 4 * threadIdx.x),
        lane(static_cast<int>(held(threadIdx.x % 32, own))),
        warp(static_cast<int>(held(threadIdx.x / 32, own))),
        row_(static_cast<int>(held(threadIdx.x % 32 / 4, own))),
        along_model_(along(model_steps())),
        along_inner_(along(inner_steps())),
        sum_to_(held(shared.sums + 4 * (threadIdx.x / 32 * kMostRows + threadIdx.x % 32 / 4), own)),
        sum_from_(held(shared.sums + 4 * min(threadIdx.x, static_cast<unsigned>(kMostRows) - 1U), own)) {
    ring_.hold(own);
  }

  [[nodiscard]] __device__ int d_model() const { return kKnown ? kSteps * kWarps * kStep : p.d_model; }
  [[nodiscard]] __device__ int d_inner() const { return kKnown ? 2 * kSteps * kWarps * kStep : p.d_inner; }
  [[nodiscard]] __device__ int model_steps() const { return kKnown ? kSteps : p.model_steps; }
  [[nodiscard]] __device__ int inner_steps() const { return kKnown ? 2 * kSteps : p.inner_steps; }
  [[nodiscard]] __device__ int model_tile() const {
    constexpr int kTile = tile_rows(kSteps * kWarps * kStep);
    return kKnown ? kTile : p.model_tile;
  }
  [[nodiscard]] __device__ int inner_tile() const {
    constexpr int kTile = tile_rows(2 * kSteps * kWarps * kStep);
    return kKnown ? kTile : p.inner_tile;
  }
  [[nodiscard]] __device__ Part model_part() const { return part(d_model(), model_steps(), along_model_); }
  [[nodiscard]] __device__ Part inner_part() const { return part(d_inner(), inner_steps(), along_inner_); }
  [[nodiscard]] __device__ bool rms() const { return kKnown || p.rms; }
  [[nodiscard]] __device__ bool gated_norm() const { return kKnown || p.gated_norm; }
  [[nodiscard]] __device__ bool norm_before_gate() const { return !kKnown && p.norm_before_gate; }
  [[nodiscard]] __device__ int groups() const { return kKnown ? 1 : p.groups; }
  [[nodiscard]] __device__ DType state_dtype() const { return kKnown ? DType::f32 : p.state_dtype; }
  // An operand that known models have, and one that they lack.
  template <typename Pointer>
  [[nodiscard]] __device__ static bool has(Pointer* operand) {
    return kKnown || operand != nullptr;
  }
  template <typename Pointer>
  [[nodiscard]] __device__ static bool has_extra(Pointer* operand) {
    return !kKnown && operand != nullptr;
  }

  const Params& p;
  const Shared shared_;
  Ring ring_;
  const unsigned own;  // address of 4 bytes of the thread's, for what is held
  const int lane;
  const int warp;

  // The next tile in the ring, once it is there; lanes wait for a piece each.
  __device__ __forceinline__ Ring::Place wait_for_tile(int bytes) {
    const Ring::Place place = ring_.next(bytes);
    const unsigned piece = place.first + static_cast<unsigned>(lane);
    if (static_cast<unsigned>(lane) < place.pieces)
      cuda::wait_for_phase(ring_.full(piece), Ring::parity(piece));
    __syncwarp();
    return place;
  }
  __device__ __forceinline__ void release_tile(const Ring::Place& place) const {
    __syncwarp();
    if (static_cast<unsigned>(lane) < place.pieces)
      cuda::arrive(ring_.empty(place.first + static_cast<unsigned>(lane)));
  }

  // Sums over all quads of all warps, in a fixed order.
  __device__ __forceinline__ float sum_up(float v) {
    const unsigned sums = next_scratch();
    v = cuda::warp_sum(v);
    if (lane == 0) write(sums + 4 * static_cast<unsigned>(warp), v);
    cuda::meet<kThreads>();
    return total(sums);
  }
  // Two in turn: whoever writes one again has passed the barrier of the other.
  __device__ __forceinline__ unsigned next_scratch() {
    turn_ ^= 4U * kMostGroups * kWarps;
    return shared_.scratch + turn_;
  }
  [[nodiscard]] __device__ static float total(unsigned of_warps) {
    static_assert(kWarps == 8);
    const uint4 a = read_16(of_warps);
    const uint4 b = read_16(of_warps + 16);
    const auto value = [](unsigned bits) { return __uint_as_float(bits); };
    return ((value(a.x) + value(a.y)) + (value(a.z) + value(a.w))) +
           ((value(b.x) + value(b.y)) + (value(b.z) + value(b.w)));
  }

  // The weight of a norm for this thread's quads, read before there is anything to weigh.
  template <int kMost>
  __device__ __forceinline__ void load_weight(const float* weight, const Part& part,
                                              float4 (&to)[kMost]) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i * 32 >= part.quads) break;
      to[i] = has(weight) && part.has(i) ? __ldg(reinterpret_cast<const float4*>(weight + part.column(i)))
                                         : float4{1.0F, 1.0F, 1.0F, 1.0F};
    }
  }

  __device__ __forceinline__ void store_quad(const Part& part, int i, uint2 bits) const {
    if (i * 32 + lane >= part.padded_quads) return;
    const unsigned to = part.stage + 256U * static_cast<unsigned>(i);
    write(to, bits.x);
    write(to + 8, bits.y);
  }
  [[nodiscard]] __device__ static uint2 bits_of_quad(const float (&v)[4]) {
    return {bits_of<T>(v[0]) | bits_of<T>(v[1]) << 16, bits_of<T>(v[2]) | bits_of<T>(v[3]) << 16};
  }
  // A vector that is multiplied as it came.
  template <int kMost>
  __device__ __forceinline__ void stage_plain(const Part& part, const uint2 (&bits)[kMost]) const {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i * 32 >= part.padded_quads) break;
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
      if (i * 32 >= part.quads) break;
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
        if (i * 32 >= part.quads) break;
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
      if (i * 32 >= part.padded_quads) break;
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

  // norm(y), over groups of channels; with norm_before_gate times silu(z).
  __device__ __forceinline__ void stage_gated_norm(const Part& part, const float4 (&weight)[kInnerQuads],
                                                   const uint2 (&z_bits)[kInnerQuads],
                                                   const uint2 (&y_bits)[kInnerQuads]) {
    float v[kInnerQuads][4];
    float square[kInnerQuads];
    float all = 0.0F;
#pragma unroll
    for (int i = 0; i < kInnerQuads; ++i) {
      if (i * 32 >= part.quads) break;
      widen<T>(y_bits[i], v[i]);
      square[i] = 0.0F;
#pragma unroll
      for (int j = 0; j < 4; ++j) square[i] = fmaf(v[i][j], v[i][j], square[i]);
      all += square[i];
    }
    const int group_size = d_inner() / groups();
    const float share = p.group_share;
    unsigned sums = 0;
    float rstd = 0.0F;
    if (groups() == 1) {
      rstd = rsqrtf(sum_up(all) * share + p.gated_norm_eps);
    } else {
      sums = next_scratch();
      for (int group = 0; group < groups(); ++group) {
        float sum = 0.0F;
#pragma unroll
        for (int i = 0; i < kInnerQuads; ++i) {
          if (i * 32 >= part.quads) break;
          if (part.column(i) / group_size == group) sum += square[i];
        }
        sum = cuda::warp_sum(sum);
        if (lane == 0) write(sums + 4 * static_cast<unsigned>(group * kWarps + warp), sum);
      }
      cuda::meet<kThreads>();
    }
#pragma unroll
    for (int i = 0; i < kInnerQuads; ++i) {
      if (i * 32 >= part.padded_quads) break;
      uint2 bits{0, 0};
      if (part.has(i)) {
        if (groups() > 1)
          rstd =
              rsqrtf(total(sums + 4U * kWarps * static_cast<unsigned>(part.column(i) / group_size)) * share +
                     p.gated_norm_eps);
        const float w[4] = {weight[i].x, weight[i].y, weight[i].z, weight[i].w};
        float n[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) n[j] = v[i][j] * (rstd * w[j]);
        if (norm_before_gate()) {
          float z[4];
          widen<T>(z_bits[i], z);
#pragma unroll
          for (int j = 0; j < 4; ++j) n[j] *= cuda::quick_silu(z[j]);
        }
        bits = bits_of_quad(n);
      }
      store_quad(part, i, bits);
    }
    __syncwarp();
  }

  // `count` rows of a matrix with d_model or d_inner columns, on their way through the ring, times the staged
  // vector. finish(row, there, sum) is called by whole warps, a row a lane, neighbours side by side.
  // kOnePass: no more than kMostRows.
  template <bool kOnePass, typename Finish>
  __device__ __forceinline__ void multiply_model(int count, const Finish& finish) {
    multiply<kOnePass>(along_model_, d_model(), model_steps(), count, model_tile(), finish);
  }
  template <bool kOnePass, typename Finish>
  __device__ __forceinline__ void multiply_inner(int count, const Finish& finish) {
    multiply<kOnePass>(along_inner_, d_inner(), inner_steps(), count, inner_tile(), finish);
  }

 private:
  [[nodiscard]] __device__ Part part(int columns, int steps, const Along& along) const {
    const int width = steps * kStep;
    const int first = warp * width;
    return {.first = first,
            .quads = (kKnown ? width : max(0, min(width, columns - first))) / 4,
            .padded_quads = width / 4,
            .stage = along.stage};
  }
  [[nodiscard]] __device__ Along along(int steps) const {
    const unsigned of_lane = threadIdx.x % 32;
    const unsigned row = of_lane / 4;
    const unsigned mine = threadIdx.x / 32 * static_cast<unsigned>(steps) * kStepBytes;
    return {.weight = held(mine + of_lane % 4 * 16 + row % 2 * kStepBytes, own),
            .fours = held(mine + of_lane % 4 * 16 + (row % 2 ^ row / 4) * kStepBytes, own),
            .x = held(shared_.x + mine + of_lane % 4 * 16 + row % 2 * 8 + row / 2 % 2 * kStepBytes, own),
            .stage = held(shared_.x + mine + of_lane / 2 * 16 + of_lane % 2 * 4, own)};
  }

  template <bool kOnePass, typename Finish>
  __device__ __forceinline__ void multiply(const Along& along, int columns, int steps, int count, int tile,
                                           const Finish& finish) {
    // Tiles of four rows, with two steps at a time.
    const bool fours = kKnown && tile <= 4;
    // In their last step, those who are ahead begin anew.
    const unsigned last = static_cast<unsigned>(steps - 1) * kStepBytes;
    const unsigned around = static_cast<unsigned>(steps) * kStepBytes;
    const unsigned w_last = along.weight + last - (row_ % 2 != 0 ? around : 0U);
    const unsigned x_last = along.x + last - (row_ / 2 % 2 != 0 ? around : 0U);
    uint2 x[kKnown ? 2 * kSteps : 1];
    if constexpr (kKnown) {
#pragma unroll
      for (int s = 0; s < (fours ? steps / 2 : steps); ++s)
        x[s] = read_8(!fours && s == steps - 1
                          ? x_last
                          : along.x + kStepBytes * static_cast<unsigned>(fours ? 2 * s : s));
    }
    const auto x_of = [&](int s) {
      if constexpr (kKnown)
        return x[s];
      else
        return read_8(s == steps - 1 ? x_last : along.x + kStepBytes * static_cast<unsigned>(s));
    };
    for (int pass = 0; kOnePass ? pass == 0 : pass < count; pass += kMostRows) {
      const int rows = kOnePass ? count : min(kMostRows, count - pass);
      // Two buffers in turn: whoever writes this one again has passed the barrier of the other.
      sums_turn_ ^= 4U * kWarps * kMostRows;
#pragma unroll 1
      for (int row = 0; row < rows; row += tile) {
        const int of_tile = min(tile, rows - row);
        const unsigned to = sum_to_ + sums_turn_ + 4U * static_cast<unsigned>(row);
        const Ring::Place place = wait_for_tile(of_tile * columns * 2);
        const unsigned weights = ring_.memory() + static_cast<unsigned>(place.offset);
        if (fours)
          multiply_fours(x_of, weights + along.fours, of_tile, columns, steps, to);
        else if (tile <= 8 || of_tile <= 8)
          multiply_tile<1>(x_of, weights, along.weight, w_last, of_tile, columns, steps, to);
        else if (kKnown && tile <= 16)
          multiply_tile<2>(x_of, weights, along.weight, w_last, of_tile, columns, steps, to);
        else
          multiply_tile<4>(x_of, weights, along.weight, w_last, of_tile, columns, steps, to);
        release_tile(place);
      }
      cuda::meet<kThreads>();
      if (warp * 32 < rows) {
        const int row = static_cast<int>(threadIdx.x);
        float part[kWarps];
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
          part[w] = read_float(sum_from_ + sums_turn_ + 4U * static_cast<unsigned>(w * kMostRows));
        finish(pass + row, row < rows,
               ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])));
      }
    }
  }

  // Eight rows at a time, on tensor cores, with weights in the place of their left operand. A lane's 16 bytes
  // of a row fill the whole of it: what the product takes for rows g and g + 8 are two halves of row g,
  // multiplied with columns of their own in which the right operand has the matching halves of the vector.
  // Lanes of odd rows are one step ahead of those of even ones, for the sake of the banks, and have a second
  // pair of columns for that. What the other four columns give is never looked at.
  //
  // x_of(s): a lane's four values of step s.
  template <int kRowGroups, typename XOf>
  __device__ __forceinline__ void multiply_tile(const XOf& x_of, unsigned weights, unsigned w_first,
                                                unsigned w_last, int rows, int columns, int steps,
                                                unsigned to) const {
    constexpr int kChains = kKnown && kRowGroups == 1 ? 2 : 1;  // of products that wait for one another
    constexpr int kUnroll = kKnown ? 32 : 2;
    const unsigned row_bytes = 2U * static_cast<unsigned>(columns);
    unsigned from[kRowGroups];
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j)
      from[j] = weights + static_cast<unsigned>(min(j * 8 + row_, rows - 1)) * row_bytes;
    float c[kRowGroups][kChains][4] = {};
    const auto step = [&](uint2 x, unsigned w_at, int chain) {
      const bool inside = kKnown || w_at < row_bytes;
      uint4 w[kRowGroups];
#pragma unroll
      for (int j = 0; j < kRowGroups; ++j) w[j] = inside ? read_16(from[j] + w_at) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < kRowGroups; ++j)
        linear_detail::multiply_step<T>(c[j][chain], w[j].x, w[j].y, w[j].z, w[j].w, x.x, x.y);
    };
#pragma unroll kUnroll
    for (int s = 0; s < steps - 1; ++s)
      step(x_of(s), w_first + kStepBytes * static_cast<unsigned>(s), s % kChains);
    step(x_of(steps - 1), w_last, (steps - 1) % kChains);
#pragma unroll
    for (int j = 0; j < kRowGroups; ++j) {
      float sum = c[j][0][0] + c[j][0][3];
      if constexpr (kChains == 2) sum += c[j][1][0] + c[j][1][3];
      if (lane % 4 == row_ % 2 && j * 8 + row_ < rows) write(to + 32U * static_cast<unsigned>(j), sum);
    }
  }

  // Up to four rows, in the places of eight: the second four take the steps that the first four leave out.
  template <typename XOf>
  __device__ __forceinline__ void multiply_fours(const XOf& x_of, unsigned weights, int rows, int columns,
                                                 int steps, unsigned to) const {
    const unsigned from =
        weights + static_cast<unsigned>(min(row_ % 4, rows - 1)) * 2U * static_cast<unsigned>(columns);
    float c[2][4] = {};
#pragma unroll
    for (int s = 0; s < steps / 2; ++s) {
      const uint4 w = read_16(from + 2 * kStepBytes * static_cast<unsigned>(s));
      const uint2 x = x_of(s);
      linear_detail::multiply_step<T>(c[s % 2], w.x, w.y, w.z, w.w, x.x, x.y);
    }
    float sum = (c[0][0] + c[0][3]) + (c[1][0] + c[1][3]);
    // The row's other half lies four rows further, in the neighbouring pair of columns.
    sum += __shfl_xor_sync(0xffffffffU, sum, 17);
    if (lane % 4 == row_ % 2 && row_ < rows) write(to, sum);
  }

  static constexpr unsigned kStepBytes = 2 * kStep;
  const int row_;  // of eight
  const Along along_model_;
  const Along along_inner_;
  const unsigned sum_to_;
  const unsigned sum_from_;
  unsigned turn_ = 0;
  unsigned sums_turn_ = 0;
};

}  // namespace krait::decode_detail

#endif
