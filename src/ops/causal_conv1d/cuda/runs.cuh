// What the kernels of causal_conv1d share: runs cut into pieces that are worked on side by side, the line of
// inputs that a token looks back on, and the activation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/cuda/elements.cuh"
#include "core/cuda/exponentials.cuh"
#include "ops/causal_conv1d/conv.h"
#include "ops/token_runs_gpu.h"

namespace krait::conv_detail {

// Tokens [begin, begin + count) of a run.
struct Piece {
  std::int64_t run = 0;
  std::int64_t begin = 0;
  std::int64_t count = 0;
};

// A run as a kernel walks it.
struct Walk {
  std::int64_t row;
  std::int64_t sequence;
  bool first;
  bool last;
  std::int64_t count;
  std::int64_t start;
  std::int64_t step;
  const std::int64_t* listed;  // positions, or null: start + i * step

  __device__ __forceinline__ std::int64_t position(std::int64_t i) const {
    return listed != nullptr ? listed[i] : start + i * step;
  }
};

// The runs of a batch and the pieces they are cut into. Of whole rows nothing is stored: run r is row r.
struct RunsView {
  const TokenRun* runs = nullptr;
  const std::int64_t* positions = nullptr;
  const Piece* list = nullptr;
  std::int64_t run_count = 0;
  std::int64_t count = 0;   // of pieces
  std::int64_t length = 0;  // of a whole row
  std::int64_t tokens = 1;  // of a piece, the last of a run excepted
  std::int64_t per_row = 0;

  __device__ __forceinline__ Walk run(std::int64_t r) const {
    if (runs == nullptr) return {r, r, true, true, length, 0, 1, nullptr};
    const TokenRun& t = runs[r];
    return {t.row,   t.sequence, t.first, t.last,
            t.count, t.start,    t.step,  t.listed < 0 ? nullptr : positions + t.listed};
  }
  __device__ __forceinline__ Piece piece(std::int64_t p) const {
    if (list != nullptr) return list[p];
    const std::int64_t r = p / per_row;
    return piece_of(r, p - r * per_row);
  }
  // Piece i of row r, of whole rows.
  __device__ __forceinline__ Piece piece_of(std::int64_t r, std::int64_t i) const {
    const std::int64_t begin = i * tokens;
    return {r, begin, begin + tokens <= length ? tokens : length - begin};
  }
};

// Runs in the memory of the GPU, with what keeps them there.
struct RunsOnDevice {
  RunsView view;
  DeviceRuns runs;
  Tensor list;
};

// `whole_rows`: there are no index tensors, so that run r is row r. `in_step`: positions of a piece are a
// step apart, it ends where padding lies between.
inline RunsOnDevice place_runs(Context& ctx, const TokenRuns& host, bool whole_rows, std::int64_t length,
                               std::int64_t tokens, bool in_step) {
  RunsOnDevice result;
  RunsView& view = result.view;
  view.run_count = static_cast<std::int64_t>(host.runs.size());
  view.length = length;
  view.tokens = tokens;
  if (whole_rows) {
    view.per_row = (length + tokens - 1) / tokens;
    view.count = view.run_count * view.per_row;
    return result;
  }
  std::vector<Piece> pieces;
  for (std::size_t r = 0; r < host.runs.size(); ++r) {
    const TokenRun& run = host.runs[r];
    for (std::int64_t begin = 0; begin < run.count;) {
      const std::int64_t end = std::min(begin + tokens, run.count);
      std::int64_t count = in_step && run.listed >= 0 ? 1 : end - begin;
      while (begin + count < end &&
             host.position(run, begin + count) == host.position(run, begin) + count * run.step)
        ++count;
      pieces.push_back({static_cast<std::int64_t>(r), begin, count});
      begin += count;
    }
  }
  result.runs = upload_runs(ctx, host);
  view.runs = result.runs.runs;
  view.positions = result.runs.positions;
  view.count = static_cast<std::int64_t>(pieces.size());
  result.list = ctx.empty(
      {static_cast<std::int64_t>(std::max<std::size_t>(pieces.size(), 1) * sizeof(Piece))}, DType::u8);
  if (!pieces.empty())
    ctx.copy(
        Tensor::wrap(pieces.data(), {static_cast<std::int64_t>(pieces.size() * sizeof(Piece))}, DType::u8),
        result.list);
  view.list = static_cast<const Piece*>(result.list.raw());
  return result;
}

// to (B, D, L) = 0 at padding tokens.
void clear_padding(const Context& ctx, const DeviceRuns& runs, const Tensor& to);

// What a run is convolved over: its tokens, before them the sequence's initial state, else zeros.
struct Line {
  cuda::AnyView<3> x;        // (B, D, L)
  cuda::AnyView<3> initial;  // (sequences, D, K-1)
  int width = 0;             // K - 1

  __device__ __forceinline__ float load(const Walk& walk, std::int64_t i, std::int64_t channel) const {
    if (i >= 0) return x.load(walk.row, channel, walk.position(i));
    return walk.first && initial ? initial.load(walk.sequence, channel, i + width) : 0.0F;
  }
};

// Filters in any dtype.
struct Filter {
  cuda::AnyView<2> weight;  // (D, K)
  cuda::AnyView<1> bias;    // (D)
  int kernel = 1;
  bool silu = false;

  __device__ __forceinline__ float bias_of(std::int64_t channel) const {
    return bias ? bias.load(channel) : 0.0F;
  }
};

inline Line line_of(const Tensor& x, const Tensor& initial, const Tensor& weight) {
  return {.x = cuda::AnyView<3>(x),
          .initial = cuda::AnyView<3>(initial),
          .width = static_cast<int>(weight.size(1) - 1)};
}
inline Filter filter_of(const Tensor& weight, const Tensor& bias, Activation activation) {
  return {.weight = cuda::AnyView<2>(weight),
          .bias = cuda::AnyView<1>(bias),
          .kernel = static_cast<int>(weight.size(1)),
          .silu = activation == Activation::silu};
}

// Forward passes and steps activate so, and add taps in one order with fmaf: a step gives the bits of the
// forward pass, and no bit depends on layout or kernel. The sigmoid is right to about 1e-6 of 1 + |value|.
__device__ __forceinline__ float activate(float v, bool silu) { return silu ? cuda::quick_silu(v) : v; }
__device__ __forceinline__ float activation_derivative(float v, bool silu) {
  return silu ? cuda::silu_slope(v, cuda::quick_sigmoid(v)) : 1.0F;
}

// Blocks for the edges of runs: some values of each.
inline constexpr int kEdgeThreads = 128;
inline dim3 edge_grid(const Context& ctx, std::int64_t runs, std::int64_t values) {
  const std::int64_t blocks = (values + kEdgeThreads - 1) / kEdgeThreads;
  return {cuda::blocks_for(ctx, runs, 1), static_cast<unsigned>(std::clamp<std::int64_t>(blocks, 1, 64))};
}

}  // namespace krait::conv_detail
