// The forward pass of causal_conv1d on a GPU.
#include <type_traits>

#include "ops/causal_conv1d/cuda/vectors.cuh"

namespace krait::conv_detail {
namespace {

using cuda::AnyView;

constexpr int kPlainTokens = 64;

struct ForwardProblem {
  Line line;
  Filter filter;
  AnyView<3> out;
  RunsView runs;
  std::int64_t channels = 0;
  std::int64_t channel_blocks = 0;
  bool lanes_over_time = false;
};

// Any width, dtypes and strides: a thread an output. Inputs come K times from the first-level cache.
__global__ void forward_plain(ForwardProblem p) {
  const int kernel = p.filter.kernel;
  for (std::int64_t item = blockIdx.x; item < p.runs.count * p.channel_blocks; item += gridDim.x) {
    const Piece piece = p.runs.piece(item / p.channel_blocks);
    const Walk walk = p.runs.run(piece.run);
    const std::int64_t channel0 = item % p.channel_blocks * 32;
    const int rows = p.lanes_over_time ? 32 : kPlainTokens;
    const int lanes = p.lanes_over_time ? kPlainTokens : 32;
    for (int j = static_cast<int>(threadIdx.y); j < rows; j += static_cast<int>(blockDim.y)) {
      for (int lane = static_cast<int>(threadIdx.x); lane < lanes; lane += 32) {
        const int i = p.lanes_over_time ? lane : j;
        const std::int64_t channel = channel0 + (p.lanes_over_time ? j : lane);
        if (i >= piece.count || channel >= p.channels) continue;
        const std::int64_t token = piece.begin + i;
        float sum = p.filter.bias_of(channel);
        for (int k = 0; k < kernel; ++k)
          sum = fmaf(p.filter.weight.load(channel, k), p.line.load(walk, token - (kernel - 1) + k, channel),
                     sum);
        p.out.store(activate(sum, p.filter.silu), walk.row, channel, walk.position(token));
      }
    }
  }
}

struct ForwardRows {
  Line line;
  Filter filter;
  FilterWords words;
  Rows x;
  Rows out;
  RunsView runs;
  Divisor lanes;    // threads that the channels of a token take
  Divisor per_row;  // tiles of a row, where runs are whole rows
};

// Channel-last: a thread computes kRowsTokens tokens of some channels, all of whose inputs it asks for at
// once. Short tiles in the order of memory, a few warps each, read and write it at nearly a copy's speed,
// which warps that walk over many tokens at hundreds of places do not. As threads are that short, the way to
// their loads has to be: no divisions, and first of all the tile itself.
constexpr int kTileThreads = 64;
[[maybe_unused]] constexpr int kTilesAtOnce = 12;  // blocks of a multiprocessor, which HIP is not told

template <typename T, int kTaps, int kVector>
__global__ void __launch_bounds__(kTileThreads, kTilesAtOnce) forward_rows(ForwardRows p) {
  constexpr int kBefore = kTaps - 1;
  using Vector = PackWord<T, kVector>;
  const std::int64_t item = std::int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  const std::int64_t index = p.lanes.quotient(item);
  if (index >= p.runs.count) return;
  const int channel = static_cast<int>(item - index * p.lanes.divisor) * kVector;
  const bool whole = p.runs.list == nullptr;
  Piece piece;
  if (whole) {
    const std::int64_t row = p.per_row.quotient(index);
    piece = p.runs.piece_of(row, index - row * p.per_row.divisor);
  } else {
    piece = p.runs.list[index];
  }
  const Walk walk = p.runs.run(piece.run);
  const int count = static_cast<int>(piece.count);
  const T* x = p.x.at<T>(walk, piece.begin, channel);
  T* out = p.out.at<T>(walk, piece.begin, channel);
  const int x_step = p.x.step(walk);
  const int out_step = p.out.step(walk);

  Vector inputs[kRowsTokens];
#pragma unroll
  for (int j = 0; j < kRowsTokens; ++j)
    inputs[j] = j < count ? load_pack<T, kVector>(x + std::int64_t{j} * x_step) : Vector{};
  float before[kBefore][kVector];
  if (whole && piece.begin > 0) {
#pragma unroll
    for (int j = 0; j < kBefore; ++j)
      widen<T>(load_pack<T, kVector>(x + std::int64_t{j - kBefore} * x_step), before[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kBefore; ++j)
#pragma unroll
      for (int v = 0; v < kVector; ++v)
        before[j][v] = p.line.load(walk, piece.begin - kBefore + j, channel + v);
  }
  float weight[kTaps][kVector];
  float bias[kVector];
  load_filter<T>(p.words, p.filter, channel, weight, bias);

  const auto compute = [&](auto silu) {
#pragma unroll
    for (int j = 0; j < kRowsTokens; ++j) {
      if (j >= count) break;
      float result[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) result[v] = bias[v];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        float input[kVector];
        if (j + k >= kBefore) widen<T>(inputs[j + k - kBefore], input);
#pragma unroll
        for (int v = 0; v < kVector; ++v)
          result[v] = fmaf(weight[k][v], j + k >= kBefore ? input[v] : before[j + k][v], result[v]);
      }
#pragma unroll
      for (int v = 0; v < kVector; ++v) result[v] = activate(result[v], decltype(silu)::value);
      store_pack(result, out + std::int64_t{j} * out_step);
    }
  };
  if (p.filter.silu)
    compute(std::true_type{});
  else
    compute(std::false_type{});
}

// to = 0 at tokens that are padding.
__global__ void clear_tokens(const TokenRuns::Token* tokens, std::int64_t count, std::int64_t channels,
                             AnyView<3> to) {
  for (std::int64_t i = blockIdx.x; i < count; i += gridDim.x)
    for (std::int64_t c = threadIdx.x; c < channels; c += blockDim.x)
      to.store(0.0F, tokens[i].row, c, tokens[i].position);
}

struct WindowProblem {
  Line line;
  RunsView runs;
  const StateRequest* requests = nullptr;  // null: the final state of each run that has one
  std::int64_t count = 0;                  // of requests, or of runs
  AnyView<3> final_states;                 // (sequences, D, K-1)
  AnyView<4> states;                       // (B, M, D, K-1)
  std::int64_t channels = 0;
};

// The K - 1 inputs after a number of tokens. Columns are written in ascending order and read at or behind the
// one being written, so that the final state may replace the initial one.
__global__ void write_windows(WindowProblem p) {
  for (std::int64_t i = blockIdx.x; i < p.count; i += gridDim.x) {
    const StateRequest wanted = p.requests != nullptr ? p.requests[i] : StateRequest{.run = i};
    const Walk walk = p.runs.run(wanted.run);
    if (p.requests == nullptr && !walk.last) continue;
    const std::int64_t tokens = p.requests != nullptr ? wanted.count : walk.count;
    for (std::int64_t c = std::int64_t{blockIdx.y} * blockDim.x + threadIdx.x; c < p.channels;
         c += std::int64_t{gridDim.y} * blockDim.x) {
      for (int j = 0; j < p.line.width; ++j) {
        const float value = p.line.load(walk, tokens - p.line.width + j, c);
        if (p.requests != nullptr)
          p.states.store(value, wanted.row, wanted.slot, c, j);
        else
          p.final_states.store(value, walk.sequence, c, j);
      }
    }
  }
}

template <typename T, int kTaps>
void launch_rows(const Context& ctx, ForwardRows rows, std::int64_t channels) {
  constexpr int kVector = forward_vector(sizeof(T));
  rows.lanes = Divisor(channels / kVector, rows.runs.count);
  rows.per_row = Divisor(std::max<std::int64_t>(rows.runs.per_row, 1), rows.runs.run_count);
  const std::int64_t blocks = (rows.runs.count * rows.lanes.divisor + kTileThreads - 1) / kTileThreads;
  cuda::launch(ctx, "causal_conv1d", forward_rows<T, kTaps, kVector>, static_cast<unsigned>(blocks),
               kTileThreads, 0, rows);
}

}  // namespace

void clear_padding(const Context& ctx, const DeviceRuns& runs, const Tensor& to) {
  if (runs.padding_count == 0 || to.numel() == 0) return;
  cuda::launch(ctx, "causal_conv1d padding", clear_tokens, cuda::blocks_for(ctx, runs.padding_count, 1), 128,
               0, runs.padding, runs.padding_count, to.size(1), AnyView<3>(to));
}

void forward_cuda(Context& ctx, const Forward& f, bool whole_rows, const Tensor& states,
                  const Tensor& final_states) {
  const std::int64_t channels = f.x.size(1);
  if (channels == 0) return;
  const bool rows = choose_kernel(f.weight.size(1), {f.x, f.out}) == ConvKernel::rows;
  const RunsOnDevice placed =
      place_runs(ctx, *f.runs, whole_rows, f.x.size(2), rows ? kRowsTokens : kPlainTokens, rows);
  const Line line = line_of(f.x, f.initial_states, f.weight);
  const Filter filter = filter_of(f.weight, f.bias, f.activation);
  if (placed.view.count > 0 && rows) {
    const ForwardRows problem{.line = line,
                              .filter = filter,
                              .words = FilterWords(f.weight, f.bias, f.x.dtype()),
                              .x = Rows(f.x),
                              .out = Rows(f.out),
                              .runs = placed.view};
    cuda::dispatch_element(f.x.dtype(), "[causal_conv1d] x", [&](auto element) {
      using T = decltype(element);
      switch (f.weight.size(1)) {
        case 2: return launch_rows<T, 2>(ctx, problem, channels);
        case 3: return launch_rows<T, 3>(ctx, problem, channels);
        default: return launch_rows<T, 4>(ctx, problem, channels);
      }
    });
  } else if (placed.view.count > 0) {
    const ForwardProblem problem{.line = line,
                                 .filter = filter,
                                 .out = AnyView<3>(f.out),
                                 .runs = placed.view,
                                 .channels = channels,
                                 .channel_blocks = (channels + 31) / 32,
                                 .lanes_over_time = f.x.stride(2) == 1 && f.x.stride(1) != 1};
    cuda::launch(ctx, "causal_conv1d plain", forward_plain,
                 cuda::blocks_for(ctx, problem.runs.count * problem.channel_blocks, 1), dim3(32, 8), 0,
                 problem);
  }
  clear_padding(ctx, placed.runs, f.out);

  // After the outputs, which read initial_states; the final states last, which may replace them.
  WindowProblem windows{.line = line, .runs = placed.view, .channels = channels};
  if (states && states.numel() > 0) {
    windows.requests = placed.runs.requests;
    windows.count = static_cast<std::int64_t>(f.runs->requests.size());
    windows.states = AnyView<4>(states);
    cuda::launch(ctx, "causal_conv1d windows", write_windows, edge_grid(ctx, windows.count, channels),
                 kEdgeThreads, 0, windows);
  }
  if (final_states && final_states.numel() > 0) {
    windows.requests = nullptr;
    windows.count = placed.view.run_count;
    windows.final_states = AnyView<3>(final_states);
    cuda::launch(ctx, "causal_conv1d windows", write_windows, edge_grid(ctx, windows.count, channels),
                 kEdgeThreads, 0, windows);
  }
}

}  // namespace krait::conv_detail
