// The backward's kernel for channels side by side in memory.
#pragma once

#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "ops/causal_conv1d/cuda/vectors.cuh"

namespace krait::conv_detail {

struct RowsProblem {
  Line line;
  Filter filter;
  FilterWords words;
  RunsView runs;
  cuda::AnyView<3> dfinal;
  Rows x;
  Rows dout;
  Rows dx;
  const void* ahead = nullptr;  // (pieces, K-1, D): dout behind each piece, where dx replaces dout
  float* partial = nullptr;     // (groups, K + 1, D): sums of g times the taps, then of g
  std::int64_t channels = 0;
  unsigned channel_blocks = 1;
};

// x and dout of the tokens that come next lie in a ring in shared memory, of some turns: on their way without
// a register, each waited for by itself. kTurnTokens is a multiple of any window's length, so that windows
// move by other names of registers, and small, so that a turn's instructions stay in the nearest cache.
template <typename T>
inline constexpr int kRingTokens = (sizeof(T) == 2 ? 3 : 2) * kTurnTokens;  // of a warp
template <typename T>
inline constexpr int kRingVectors = 64 * kRingTokens<T>;
inline constexpr int kBlocksAtOnce = 3;  // of a multiprocessor

template <typename T, int kTaps>
constexpr std::size_t backward_shared_bytes() {
  constexpr std::size_t kRings = kWarps * kRingVectors<T> * sizeof(PackWord<T, kBackwardVector>);
  constexpr std::size_t kSums = kWarps * (kTaps + 1) * 32 * kBackwardVector * sizeof(float);
  return kRings > kSums ? kRings : kSums;
}

// Token j from `from` on, tokens `step` bytes apart.
template <typename T>
__device__ __forceinline__ T* token_at(T* from, int j, int step) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + std::int64_t{j} * step);
}

// What a lane holds of its channels: the filter, the inputs and gradients of the kWidth tokens before and of
// the kTokens at hand, and the sums over tokens.
//
// With silu, taps and bias are scaled by -log2(e), as the exponential wants what the activation saw, and
// gradients by -ln(2): in dx the two cancel, the sums are scaled back at the end.
template <int kTaps, bool kSilu, int kTokens>
struct Window {
  static constexpr int kWidth = kTaps - 1;
  static constexpr int kVector = kBackwardVector;
  static constexpr float kTapScale = kSilu ? -cuda::kLog2E : 1.0F;

  float weight[kTaps][kVector];
  float bias[kVector];
  float inputs[kWidth + kTokens][kVector];
  float gradients[kWidth + kTokens][kVector];
  float sums[kTaps + 1][kVector];  // the bias's behind the taps'

  __device__ __forceinline__ void scale_filter() {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) weight[k][v] *= kTapScale;
      bias[v] *= kTapScale;
    }
  }
  // The gradient of what the activation saw at token j, whose input is there, from its dout.
  __device__ __forceinline__ void derive(int j, const float (&dout)[kVector]) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float sum = bias[v];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) sum = fmaf(weight[k][v], inputs[j + k][v], sum);
      float& g = gradients[kWidth + j][v];
      if constexpr (kSilu) {
        constexpr float kLn2 = 1.0F / cuda::kLog2E;
        const float sigmoid = cuda::reciprocal_fast(1.0F + cuda::exp2_fast(sum));
        const float rest = fmaf(sigmoid, -kLn2 * kLn2, kLn2 * kLn2);
        g = dout[v] * sigmoid * fmaf(sum, rest, -kLn2);
      } else {
        g = dout[v];
      }
    }
  }
  __device__ __forceinline__ void add_to_sums(int j) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float g = gradients[kWidth + j][v];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) sums[k][v] = fmaf(g, inputs[j + k][v], sums[k][v]);
      sums[kTaps][v] += g;
    }
  }
  // The gradient of the input kWidth tokens before token j.
  __device__ __forceinline__ void propagate(int j, float (&to)[kVector]) const {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      to[v] = weight[0][v] * gradients[kWidth + j][v];
#pragma unroll
      for (int k = 1; k < kTaps; ++k) to[v] = fmaf(weight[k][v], gradients[kWidth + j - k][v], to[v]);
    }
  }
  __device__ __forceinline__ void move(int tokens) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        inputs[k][v] = inputs[tokens + k][v];
        gradients[k][v] = gradients[tokens + k][v];
      }
  }
};

// A warp walks one piece and the K - 1 tokens behind it, each lane with kBackwardVector channels; dx follows
// K - 1 tokens behind dout. A lane reads of the ring what it copied there itself.
template <typename T, int kTaps, bool kSilu>
__global__ void __launch_bounds__(kWarps * 32, kBlocksAtOnce) backward_rows(RowsProblem p) {
  constexpr int kVector = kBackwardVector;
  constexpr int kChannels = 32 * kVector;
  constexpr int kWidth = kTaps - 1;
  constexpr int kTogether = 2;  // tokens whose latencies hide each other
  constexpr int kTurns = kRingTokens<T> / kTurnTokens;
  using Vector = PackWord<T, kVector>;
  extern __shared__ uint4 shared[];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t channel0 = std::int64_t{blockIdx.x % p.channel_blocks} * kChannels;
  const std::int64_t group = blockIdx.x / p.channel_blocks;
  const std::int64_t channel = channel0 + lane * kVector;
  const std::int64_t index = group * kWarps + warp;

  Window<kTaps, kSilu, kTurnTokens> window;
#pragma unroll
  for (int k = 0; k <= kTaps; ++k)
#pragma unroll
    for (int v = 0; v < kVector; ++v) window.sums[k][v] = 0.0F;
  if (channel < p.channels && index < p.runs.count) {
    const Piece piece = p.runs.piece(index);
    const Walk walk = p.runs.run(piece.run);
    const int count = static_cast<int>(piece.count);
    const int x_step = p.x.step_bytes<T>(walk);
    const int dout_step = p.dout.step_bytes<T>(walk);
    const int dx_step = p.dx.step_bytes<T>(walk);
    const bool wants_dx = p.dx.data != nullptr;
    const T* x = p.x.at<T>(walk, piece.begin, channel);  // of the token that is copied next
    const T* dout = p.dout.at<T>(walk, piece.begin, channel);
    T* dx = token_at(p.dx.at<T>(walk, piece.begin, channel), -kWidth, dx_step);

    Vector* const ring = reinterpret_cast<Vector*>(shared) + warp * kRingVectors<T> + lane;
    const auto copy = [&](Vector* turn, int j) {
      cuda::copy_async<sizeof(Vector)>(turn + 64 * j, token_at(x, j, x_step));
      cuda::copy_async<sizeof(Vector)>(turn + 64 * j + 32, token_at(dout, j, dout_step));
    };
    const auto end_copies_of_turn = [&] {
      cuda::commit_copies();
      x = token_at(x, kTurnTokens, x_step);
      dout = token_at(dout, kTurnTokens, dout_step);
    };
    const auto take = [&](const Vector* turn, int j, int place, float(&d)[kVector]) {
      const Vector token = turn[64 * j];
      const Vector gradient = turn[64 * j + 32];
      widen<T>(token, window.inputs[kWidth + place]);
      widen<T>(gradient, d);
    };
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
#pragma unroll
      for (int j = 0; j < kTurnTokens; ++j)
        if (t * kTurnTokens + j < count) copy(ring + 64 * kTurnTokens * t, j);
      end_copies_of_turn();
    }

    load_filter<T>(p.words, p.filter, channel, window.weight, window.bias);
    window.scale_filter();
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const std::int64_t i = piece.begin - kWidth + k;
      if (i >= 0) {
        widen<T>(load_pack<T, kVector>(p.x.at<T>(walk, i, channel)), window.inputs[k]);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) window.inputs[k][v] = p.line.load(walk, i, channel + v);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) window.gradients[k][v] = 0.0F;  // another piece's
    }

    Vector* turn = ring;
    for (int i = 0; i < count; i += kTurnTokens) {
      cuda::wait_for_copies<kTurns - 1>();
      const int left = count - i - kRingTokens<T>;  // to be copied
      const bool copies = left >= kTurnTokens;
      if (wants_dx && i + kTurnTokens <= count && (copies || left <= 0)) {
        // What a piece's beginning gives for tokens before it goes where its own first gradients come to lie.
        T* const first = i > 0 ? dx : token_at(dx, kWidth, dx_step);
#pragma unroll
        for (int j0 = 0; j0 < kTurnTokens; j0 += kTogether) {
          float d[kTogether][kVector];
#pragma unroll
          for (int j = 0; j < kTogether; ++j) take(turn, j0 + j, j0 + j, d[j]);
#pragma unroll
          for (int j = 0; j < kTogether; ++j)
            if (copies) copy(turn, j0 + j);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) window.derive(j0 + j, d[j]);
#pragma unroll
          for (int j = j0; j < j0 + kTogether; ++j) {
            float back[kVector];
            window.add_to_sums(j);
            window.propagate(j, back);
            store_pack(back, token_at(j < kWidth ? first : dx, j, dx_step));
          }
        }
        window.move(kTurnTokens);
      } else {
#pragma unroll
        for (int j = 0; j < kTurnTokens; ++j) {
          if (i + j < count) {
            float d[kVector];
            float back[kVector];
            take(turn, j, 0, d);
            window.derive(0, d);
            window.add_to_sums(0);
            window.propagate(0, back);
            window.move(1);
            if (wants_dx && i + j >= kWidth) store_pack(back, token_at(dx, j, dx_step));
          }
          if (j < left) copy(turn, j);
        }
      }
      end_copies_of_turn();
      dx = token_at(dx, kTurnTokens, dx_step);
      turn = turn + 64 * kTurnTokens < ring + kRingVectors<T> ? turn + 64 * kTurnTokens : ring;
    }
    // The tokens behind the piece, which are in another's sums; behind the run there is the final state.
    if (wants_dx) {
      dx = token_at(dx, (count - 1) % kTurnTokens + 1 - kTurnTokens, dx_step);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const std::int64_t i = piece.begin + count + j;
        Vector token{};
        Vector gradient{};
        float d[kVector];
        float back[kVector];
        float state[kVector] = {};
        if (i < walk.count) {
          token = load_pack<T, kVector>(p.x.at<T>(walk, i, channel));
          gradient =
              load_pack<T, kVector>(p.ahead != nullptr ? static_cast<const T*>(p.ahead) +
                                                             (index * kWidth + j) * p.channels + channel
                                                       : p.dout.at<T>(walk, i, channel));
        } else if (walk.last && p.dfinal) {
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            state[v] = p.dfinal.load(walk.sequence, channel + v, i - walk.count);
        }
        widen<T>(token, window.inputs[kWidth]);
        widen<T>(gradient, d);
        window.derive(0, d);
        window.propagate(0, back);
        window.move(1);
#pragma unroll
        for (int v = 0; v < kVector; ++v) back[v] += state[v];
        if (count + j >= kWidth) store_pack(back, token_at(dx, j, dx_step));
      }
    }
  }

  if (p.partial == nullptr) return;
  __syncthreads();  // the rings have been read
  auto* const sums = reinterpret_cast<float(*)[kTaps + 1][kChannels]>(shared);
#pragma unroll
  for (int k = 0; k <= kTaps; ++k)
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      sums[warp][k][lane * kVector + v] = window.sums[k][v] * window.kTapScale;
  __syncthreads();
  for (int at = static_cast<int>(threadIdx.x); at < (kTaps + 1) * kChannels; at += kWarps * 32) {
    const int k = at / kChannels;
    const int c = at % kChannels;
    if (channel0 + c >= p.channels) continue;
    float sum = sums[0][k][c];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += sums[w][k][c];
    p.partial[(group * (kTaps + 1) + k) * p.channels + channel0 + c] = sum;
  }
}

}  // namespace krait::conv_detail
