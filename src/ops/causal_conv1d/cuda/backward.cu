// The backward of causal_conv1d on a GPU. With g the gradient of what the activation saw, place j of a run's
// line (its K - 1 inputs before it, then its own n tokens) has the gradient
//   sum_k weight_k g_{j-k} + dfinal_{j-n}
// Sums over tokens are made for groups of pieces, then over the groups in order.
#include "ops/causal_conv1d/cuda/backward_rows.cuh"

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
      for (std::int64_t c = std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x; c < p.channels;
           c += std::int64_t{gridDim.y} * blockDim.x)
        to[(index * width + j) * p.channels + c] = from[c];
    }
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
void launch_rows(const Context& ctx, const RowsProblem& rows, std::int64_t groups) {
  const auto grid = static_cast<unsigned>(groups * rows.channel_blocks);
  const auto kernel = rows.filter.silu ? backward_rows<T, kTaps, true> : backward_rows<T, kTaps, false>;
  cuda::launch(ctx, "causal_conv1d_backward", kernel, grid, kWarps * 32, backward_shared_bytes<T, kTaps>(),
               rows);
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
      constexpr std::int64_t kChannels = 32 * kBackwardVector;
      RowsProblem walk{.line = problem.line,
                       .filter = problem.filter,
                       .words = FilterWords(b.weight, b.bias, b.x.dtype()),
                       .runs = problem.runs,
                       .dfinal = problem.dfinal,
                       .x = Rows(b.x),
                       .dout = Rows(b.dout),
                       .dx = Rows(b.dx),
                       .partial = problem.partial,
                       .channels = channels,
                       .channel_blocks = static_cast<unsigned>((channels + kChannels - 1) / kChannels)};
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
                       edge_grid(ctx, walk.runs.count, channels), kEdgeThreads, 0, walk,
                       static_cast<T*>(ahead.raw()));
        switch (kernel) {
          case 2: return launch_rows<T, 2>(ctx, walk, groups);
          case 3: return launch_rows<T, 3>(ctx, walk, groups);
          default: return launch_rows<T, 4>(ctx, walk, groups);
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
