// The backward of causal_conv1d on a GPU. With g the gradient of what the activation saw, place j of a run's
// line (its K - 1 inputs before it, then its own n tokens) has the gradient
//   sum_k weight_k g_{j-k} + dfinal_{j-n}
// Sums over tokens are made for groups of pieces, then over the groups in order.
#include "ops/causal_conv1d/cuda/vectors.cuh"

namespace krait::conv_detail {
namespace {

using cuda::AnyView;

constexpr int kPlainTokens = 64;

struct BackwardProblem {
  Line line;
  Filter filter;
  RunsView runs;
  AnyView<3> dout;
  AnyView<3> dfinal;    // (sequences, D, K-1)
  AnyView<3> dinitial;  // (sequences, D, K-1)
  AnyView<3> dx;
  float* gradient = nullptr;  // (B, L, D): g, in the plain kernels
  float* partial = nullptr;   // (groups, K + 1, D): sums of g times the taps, then of g
  std::int64_t length = 0;
  std::int64_t channels = 0;
  std::int64_t channel_blocks = 0;

  __device__ __forceinline__ float gradient_at(const Walk& walk, std::int64_t i, std::int64_t channel) const {
    return gradient[(walk.row * length + walk.position(i)) * channels + channel];
  }
  // g of token i of a run, from the inputs.
  __device__ float gradient_of(const Walk& walk, std::int64_t i, std::int64_t channel) const {
    float sum = filter.bias_of(channel);
    if (filter.silu)
      for (int k = 0; k < filter.kernel; ++k)
        sum = fmaf(filter.weight.load(channel, k), line.load(walk, i - line.width + k, channel), sum);
    return dout.load(walk.row, channel, walk.position(i)) * activation_derivative(sum, filter.silu);
  }
};

// body(walk, token, channel) for the tokens of all pieces; blocks of 32 channels.
template <typename Body>
__device__ __forceinline__ void for_tokens(const BackwardProblem& p, const Body& body) {
  for (std::int64_t item = blockIdx.x; item < p.runs.count * p.channel_blocks; item += gridDim.x) {
    const Piece piece = p.runs.piece(item / p.channel_blocks);
    const Walk walk = p.runs.run(piece.run);
    const std::int64_t channel = item % p.channel_blocks * 32 + threadIdx.x;
    if (channel >= p.channels) continue;
    for (std::int64_t i = threadIdx.y; i < piece.count; i += blockDim.y) body(walk, piece.begin + i, channel);
  }
}

__global__ void plain_gradient(BackwardProblem p) {
  for_tokens(p, [&](const Walk& walk, std::int64_t i, std::int64_t channel) {
    p.gradient[(walk.row * p.length + walk.position(i)) * p.channels + channel] =
        p.gradient_of(walk, i, channel);
  });
}

__global__ void plain_dx(BackwardProblem p) {
  const int width = p.line.width;
  for_tokens(p, [&](const Walk& walk, std::int64_t i, std::int64_t channel) {
    const std::int64_t beyond = i + width - walk.count;  // of the run's tokens, into the final state
    float sum = beyond >= 0 && walk.last && p.dfinal ? p.dfinal.load(walk.sequence, channel, beyond) : 0.0F;
    for (int k = 0; k <= width; ++k)
      if (i + width - k < walk.count)
        sum = fmaf(p.filter.weight.load(channel, k), p.gradient_at(walk, i + width - k, channel), sum);
    p.dx.store(sum, walk.row, channel, walk.position(i));
  });
}

// A thread a sum: over the tokens of one piece, for one channel and tap (or the bias, behind them).
__global__ void plain_sums(BackwardProblem p) {
  const int kernel = p.filter.kernel;
  for (std::int64_t item = blockIdx.x; item < p.runs.count * p.channel_blocks; item += gridDim.x) {
    const std::int64_t index = item / p.channel_blocks;
    const Piece piece = p.runs.piece(index);
    const Walk walk = p.runs.run(piece.run);
    const std::int64_t channel = item % p.channel_blocks * 32 + threadIdx.x;
    if (channel >= p.channels) continue;
    for (int k = static_cast<int>(threadIdx.y); k <= kernel; k += static_cast<int>(blockDim.y)) {
      float sum = 0.0F;
      for (std::int64_t i = piece.begin; i < piece.begin + piece.count; ++i) {
        const float g = p.gradient_at(walk, i, channel);
        sum = fmaf(g, k < kernel ? p.line.load(walk, i - p.line.width + k, channel) : 1.0F, sum);
      }
      p.partial[(index * (kernel + 1) + k) * p.channels + channel] = sum;
    }
  }
}

// The gradient of the initial states, a thread a value. A sequence without tokens passes dfinal on.
__global__ void initial_gradients(BackwardProblem p) {
  const int width = p.line.width;
  for (std::int64_t r = blockIdx.x; r < p.runs.run_count; r += gridDim.x) {
    const Walk walk = p.runs.run(r);
    if (!walk.first) continue;
    for (std::int64_t at = std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x; at < p.channels * width;
         at += std::int64_t{gridDim.y} * blockDim.x) {
      const std::int64_t channel = at / width;
      const std::int64_t j = at % width;
      float sum = j >= walk.count && walk.last && p.dfinal
                      ? p.dfinal.load(walk.sequence, channel, j - walk.count)
                      : 0.0F;
      for (std::int64_t k = 0; k <= j; ++k)
        if (j - k < walk.count)
          sum = fmaf(p.filter.weight.load(channel, k), p.gradient_of(walk, j - k, channel), sum);
      p.dinitial.store(sum, walk.sequence, channel, j);
    }
  }
}

struct RowsProblem {
  Line line;
  Filter filter;
  RunsView runs;
  AnyView<3> dfinal;
  Rows x;
  Rows dout;
  Rows dx;
  const void* ahead = nullptr;  // (pieces, K-1, D): dout behind each piece, where dx replaces dout
  float* partial = nullptr;
  std::int64_t channels = 0;
  unsigned channel_blocks = 1;
};

// dout of the K - 1 tokens behind each piece, before neighbours overwrite it.
template <typename T>
__global__ void copy_ahead(RowsProblem p, T* to) {
  const int width = p.line.width;
  for (std::int64_t index = blockIdx.x; index < p.runs.count; index += gridDim.x) {
    const Piece piece = p.runs.piece(index);
    const Walk walk = p.runs.run(piece.run);
    for (int j = 0; j < width; ++j) {
      const std::int64_t i = piece.begin + piece.count + j;
      if (i >= walk.count) break;
      const T* from = p.dout.at<T>(walk, i, 0);
      for (std::int64_t c = threadIdx.x; c < p.channels; c += blockDim.x)
        to[(index * width + j) * p.channels + c] = from[c];
    }
  }
}

// Channel-last: one walk over a piece and the K - 1 tokens behind it. dx follows K - 1 tokens behind dout;
// the last inputs and gradients, the K + 1 sums and the taps stay in registers.
constexpr int kBlocksAtOnce = 3;  // of a multiprocessor

template <typename T, int kTaps, int kVector>
__global__ void __launch_bounds__(kWarps * 32, kBlocksAtOnce) backward_rows(RowsProblem p) {
  constexpr int kChannels = 32 * kVector;
  constexpr int kWidth = kTaps - 1;
  constexpr int kAhead = 6;
  using Vector = PackWord<T, kVector>;
  __shared__ float staged[kTaps + 1][kChannels];
  __shared__ float sums[kWarps][kTaps + 1][kChannels];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t channel0 = std::int64_t{blockIdx.x % p.channel_blocks} * kChannels;
  const std::int64_t group = blockIdx.x / p.channel_blocks;
  stage_filter<kTaps>(p.filter, channel0, p.channels, staged);
  const std::int64_t channel = channel0 + lane * kVector;
  const std::int64_t index = group * kWarps + warp;

  float dweight[kTaps + 1][kVector] = {};  // the bias's behind the taps'
  if (channel < p.channels && index < p.runs.count) {
    const Piece piece = p.runs.piece(index);
    const Walk walk = p.runs.run(piece.run);
    const T* x = p.x.at<T>(walk, piece.begin, channel);
    const T* dout = p.dout.at<T>(walk, piece.begin, channel);
    T* dx = p.dx.data != nullptr ? p.dx.at<T>(walk, piece.begin, channel) : nullptr;
    const int x_step = p.x.step(walk);
    const int dout_step = p.dout.step(walk);
    const int dx_step = p.dx.step(walk);
    const int count = static_cast<int>(piece.count);
    const bool needs_x = p.partial != nullptr || p.filter.silu;
    float weight[kTaps][kVector];
    float bias[kVector];
#pragma unroll
    for (int k = 0; k < kTaps; ++k) read_staged(staged, k, lane, weight[k]);
    read_staged(staged, kTaps, lane, bias);

    float inputs[kWidth][kVector];          // before the next token, the oldest first
    float gradients[kWidth][kVector] = {};  // g of the tokens before it, within the piece
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const std::int64_t i = piece.begin - kWidth + k;
      if (i >= 0) {
        widen<T>(load_pack<T, kVector>(p.x.at<T>(walk, i, channel)), inputs[k]);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) inputs[k][v] = p.line.load(walk, i, channel + v);
      }
    }

    // Takes token i (of the piece, from 0; or of the kWidth behind it) and gives the gradient of the token
    // kWidth before it, `back` being what the final state adds.
    const auto advance = [&](const Vector& token, const Vector& gradient, bool counted,
                             float(&back)[kVector]) {
      float input[kVector];
      float d[kVector];
      widen<T>(token, input);
      widen<T>(gradient, d);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        float sum = bias[v];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sum = fmaf(weight[k][v], inputs[k][v], sum);
        sum = fmaf(weight[kWidth][v], input[v], sum);
        const float g = d[v] * activation_derivative(sum, p.filter.silu);
        if (counted) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) dweight[k][v] = fmaf(g, inputs[k][v], dweight[k][v]);
          dweight[kWidth][v] = fmaf(g, input[v], dweight[kWidth][v]);
          dweight[kTaps][v] += g;
        }
        float result = fmaf(weight[0][v], g, back[v]);
#pragma unroll
        for (int k = 1; k < kTaps; ++k) result = fmaf(weight[k][v], gradients[kWidth - k][v], result);
        back[v] = result;
#pragma unroll
        for (int k = 0; k < kWidth - 1; ++k) {
          inputs[k][v] = inputs[k + 1][v];
          gradients[k][v] = gradients[k + 1][v];
        }
        inputs[kWidth - 1][v] = input[v];
        gradients[kWidth - 1][v] = g;
      }
    };

    const auto load_x = [&](int i) {  // of tokens in their order, as dout
      Vector word{};
      if (i < count && needs_x) word = load_pack<T, kVector>(x);
      x += x_step;
      return word;
    };
    const auto load_dout = [&](int i) {
      Vector word{};
      if (i < count) word = load_pack<T, kVector>(dout);
      dout += dout_step;
      return word;
    };
    Vector next_x[kAhead];
    Vector next_dout[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      next_x[j] = load_x(j);
      next_dout[j] = load_dout(j);
    }
    const auto take = [&](int j, int i) {
      const Vector token = next_x[j];
      const Vector gradient = next_dout[j];
      next_x[j] = load_x(i + kAhead);
      next_dout[j] = load_dout(i + kAhead);
      float back[kVector] = {};
      advance(token, gradient, true, back);
      if (dx != nullptr && i >= kWidth) {
        store_pack(back, dx);
        dx += dx_step;
      }
    };
    // Whole groups without a way out between tokens, so that windows move by other names of registers.
    int begin = 0;
    for (; begin + kAhead <= count; begin += kAhead) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) take(j, begin + j);
    }
#pragma unroll
    for (int j = 0; j < kAhead - 1; ++j)
      if (begin + j < count) take(j, begin + j);
    // The tokens behind the piece, which are in another's sums; behind the run there is the final state.
    if (dx != nullptr) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const std::int64_t i = piece.begin + count + j;
        Vector token{};
        Vector gradient{};
        float back[kVector] = {};
        if (i < walk.count) {
          if (needs_x) token = load_pack<T, kVector>(p.x.at<T>(walk, i, channel));
          gradient =
              load_pack<T, kVector>(p.ahead != nullptr ? static_cast<const T*>(p.ahead) +
                                                             (index * kWidth + j) * p.channels + channel
                                                       : p.dout.at<T>(walk, i, channel));
        } else if (walk.last && p.dfinal) {
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            back[v] = p.dfinal.load(walk.sequence, channel + v, i - walk.count);
        }
        advance(token, gradient, false, back);
        if (count + j >= kWidth) {
          store_pack(back, dx);
          dx += dx_step;
        }
      }
    }
  }

  if (p.partial == nullptr) return;
#pragma unroll
  for (int k = 0; k <= kTaps; ++k)
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[warp][k][lane * kVector + v] = dweight[k][v];
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

// dweight and dbias += the sums of `groups` partial sums. Warps take every 8th group, then are added in
// order.
__global__ void __launch_bounds__(256)
    add_partials(const float* partial, std::int64_t groups, int kernel, std::int64_t channels,
                 AnyView<2> dweight, AnyView<1> dbias) {
  __shared__ float sums[8][32];
  const std::int64_t columns = (kernel + 1) * channels;
  const std::int64_t column = std::int64_t{blockIdx.x} * 32 + threadIdx.x;
  float sum = 0.0F;
  if (column < columns)
    for (std::int64_t g = threadIdx.y; g < groups; g += 8) sum += partial[g * columns + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  for (int w = 1; w < 8; ++w) sum += sums[w][threadIdx.x];
  const std::int64_t k = column / channels;
  const std::int64_t channel = column % channels;
  if (k < kernel && dweight) dweight.store(dweight.load(channel, k) + sum, channel, k);
  if (k == kernel && dbias) dbias.store(dbias.load(channel) + sum, channel);
}

template <typename T, int kTaps>
void launch_rows(const Context& ctx, RowsProblem rows) {
  constexpr int kVector = kBackwardVector;
  rows.channel_blocks = static_cast<unsigned>((rows.channels + 32 * kVector - 1) / (32 * kVector));
  const std::int64_t groups = (rows.runs.count + kWarps - 1) / kWarps;
  const auto grid = static_cast<unsigned>(groups * rows.channel_blocks);
  cuda::launch(ctx, "causal_conv1d_backward", backward_rows<T, kTaps, kVector>, grid, kWarps * 32, 0, rows);
}

}  // namespace

void backward_cuda(Context& ctx, const Backward& b, bool whole_rows) {
  const std::int64_t channels = b.x.size(1);
  const std::int64_t length = b.x.size(2);
  const std::int64_t kernel = b.weight.size(1);
  if (channels == 0) return;
  const bool rows = choose_kernel(kernel, {b.x, b.dout, b.dx}) == ConvKernel::rows;
  const std::int64_t tokens =
      rows ? choose_tokens(b.x.size(0), length, channels, kBackwardVector,
                           std::int64_t{kBlocksAtOnce} * cuda::limits_of(ctx).multiprocessors)
           : kPlainTokens;
  const RunsOnDevice placed = place_runs(ctx, *b.runs, whole_rows, length, tokens, rows);
  // Runs are walked side by side: what one writes, another may still have to read.
  const bool replaces_final = same_view(b.dinitial_states, b.dfinal_states);
  const Tensor dfinal =
      replaces_final && b.dfinal_states.numel() > 0 ? ctx.clone(b.dfinal_states) : b.dfinal_states;
  BackwardProblem problem{.line = line_of(b.x, b.initial_states, b.weight),
                          .filter = filter_of(b.weight, b.bias, b.activation),
                          .runs = placed.view,
                          .dout = AnyView<3>(b.dout),
                          .dfinal = AnyView<3>(dfinal),
                          .dx = AnyView<3>(b.dx),
                          .length = length,
                          .channels = channels,
                          .channel_blocks = (channels + 31) / 32};

  // Before dx, which may replace the dout that this reads.
  if (b.dinitial_states && b.dinitial_states.numel() > 0) {
    problem.dinitial = AnyView<3>(b.dinitial_states);
    cuda::launch(ctx, "causal_conv1d_backward initial states", initial_gradients,
                 edge_grid(ctx, problem.runs.run_count, channels * (kernel - 1)), kEdgeThreads, 0, problem);
  }

  const bool sums = b.dweight || b.dbias;
  const std::int64_t groups = rows ? (placed.view.count + kWarps - 1) / kWarps : placed.view.count;
  if (placed.view.count > 0 && (b.dx || sums)) {
    Tensor partial;
    if (sums) {
      partial = ctx.empty({groups, kernel + 1, channels});
      problem.partial = partial.data<float>();
    }
    if (rows) {
      RowsProblem walk{.line = problem.line,
                       .filter = problem.filter,
                       .runs = problem.runs,
                       .dfinal = problem.dfinal,
                       .x = Rows(b.x),
                       .dout = Rows(b.dout),
                       .dx = Rows(b.dx),
                       .partial = problem.partial,
                       .channels = channels};
      Tensor ahead;
      const bool replaces_dout = same_view(b.dx, b.dout);
      if (replaces_dout) {
        ahead = ctx.empty({placed.view.count, kernel - 1, channels}, b.dout.dtype());
        walk.ahead = ahead.raw();
      }
      cuda::dispatch_element(b.x.dtype(), "[causal_conv1d_backward] x", [&](auto element) {
        using T = decltype(element);
        if (replaces_dout)
          cuda::launch(ctx, "causal_conv1d_backward ahead", copy_ahead<T>,
                       cuda::blocks_for(ctx, walk.runs.count, 1), 128, 0, walk, static_cast<T*>(ahead.raw()));
        switch (kernel) {
          case 2: return launch_rows<T, 2>(ctx, walk);
          case 3: return launch_rows<T, 3>(ctx, walk);
          default: return launch_rows<T, 4>(ctx, walk);
        }
      });
    } else {
      const Tensor gradient = ctx.empty({b.x.size(0), length, channels});
      problem.gradient = gradient.data<float>();
      const unsigned grid = cuda::blocks_for(ctx, problem.runs.count * problem.channel_blocks, 1);
      cuda::launch(ctx, "causal_conv1d_backward plain gradient", plain_gradient, grid, dim3(32, 8), 0,
                   problem);
      if (sums)
        cuda::launch(ctx, "causal_conv1d_backward plain sums", plain_sums, grid, dim3(32, 8), 0, problem);
      if (b.dx) cuda::launch(ctx, "causal_conv1d_backward plain dx", plain_dx, grid, dim3(32, 8), 0, problem);
    }
    if (sums) {
      const auto grid = static_cast<unsigned>(((kernel + 1) * channels + 31) / 32);
      cuda::launch(ctx, "causal_conv1d_backward sums", add_partials, grid, dim3(32, 8), 0, problem.partial,
                   groups, static_cast<int>(kernel), channels, AnyView<2>(b.dweight), AnyView<1>(b.dbias));
    }
  }
  if (b.dx) clear_padding(ctx, placed.runs, b.dx);
}

}  // namespace krait::conv_detail
