// Chooses between the three ways that the backward goes, gives them memory, and adds up what their blocks
// leave.
#include <algorithm>

#include "core/cuda/backend.h"
#include "ops/ssd/cuda/backward.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// What blocks leave for others to add up, which one launch does.
struct Leftovers {
  // (parts, B, L, G, N) become (B, L, G, N), in the order of parts.
  struct OfParts {
    const float* values;
    AnyView<4> to;
  };
  // (segments, count, width) are added to (rows, columns), count of them.
  struct OfSegments {
    const float* values;
    std::int64_t width, count, columns;
    AnyView<2> to;
  };
  OfParts of_parts[2];
  OfSegments of_segments[3];
  std::int64_t tensors = 0;  // of the first kind
  std::int64_t parts = 1, length = 0, groups = 0, d_state = 0, elements = 0;
  std::int64_t segments = 0;
  unsigned blocks_of_parts = 0;  // then one for each element of the second kind
};

// A warp for each row of a tensor.
__device__ void add_parts(const Leftovers& left) {
  const std::int64_t rows = left.elements / left.d_state;
  for (std::int64_t i = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; i < left.tensors * rows;
       i += std::int64_t{left.blocks_of_parts} * kWarps) {
    const Leftovers::OfParts& of = left.of_parts[i / rows];
    const std::int64_t row = i % rows;
    const std::int64_t token = row / left.groups;
    for (std::int64_t n = threadIdx.x % 32; n < left.d_state; n += 32) {
      float sum = 0.0F;
      for (std::int64_t part = 0; part < left.parts; ++part)
        sum += of.values[part * left.elements + row * left.d_state + n];
      of.to.store(sum, token / left.length, token % left.length, row % left.groups, n);
    }
  }
}

__global__ void add_up_kernel(const __grid_constant__ Leftovers left) {
  if (blockIdx.x < left.blocks_of_parts) {
    add_parts(left);
    return;
  }
  __shared__ double scratch[kThreads];
  std::int64_t i = blockIdx.x - left.blocks_of_parts;
  int which = 0;
  for (; i >= left.of_segments[which].count; ++which) i -= left.of_segments[which].count;
  const Leftovers::OfSegments& of = left.of_segments[which];
  double sum = 0.0;
  for (std::int64_t k = threadIdx.x; k < left.segments * of.width; k += kThreads)
    sum += static_cast<double>(of.values[(k / of.width * of.count + i) * of.width + k % of.width]);
  scratch[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
  }
  if (threadIdx.x == 0) {
    const double before = static_cast<double>(of.to.load(i / of.columns, i % of.columns));
    of.to.store(static_cast<float>(before + scratch[0]), i / of.columns, i % of.columns);
  }
}

std::int64_t longest_run(const Problem& p) {
  std::int64_t longest = 0;
  for (const TokenRun& run : p.runs->runs) longest = std::max(longest, run.count);
  return longest;
}

// The gradients of all segments, token by token.
void backward_of_segments(Context& ctx, const BackwardProblem& b, const Inputs& in, const Segments& segments,
                          const Gradients& to, const Sums& sums) {
  const Dims states{segments.count, in.heads, in.headdim, in.d_state};
  const Tensor starts = ctx.empty(states);
  const Tensor ends = ctx.empty(states);
  const Tensor decays = ctx.empty({segments.count, in.heads});
  segment_decays(ctx, in, segments, decays);
  if (segments.per_run > 1) walk_ends(ctx, in, segments, starts);
  pass_states(ctx, in, segments, decays, starts);
  if (segments.per_run > 1 || b.dinitial_states)
    walk_gradient_ends(ctx, in, segments, b.dout, b.dinitial_states.defined(), ends);
  pass_gradients(ctx, in, segments, decays, b.dfinal_states, b.dinitial_states, ends);
  token_backward(ctx, in, segments, b.dout, starts, ends, to, sums);
}

// The same on tensor cores: states and gradients of all chunks are walked first, by longer segments.
void backward_of_chunks(Context& ctx, const BackwardProblem& b, const Inputs& in, const Segments& chunks,
                        const Gradients& to, const Sums& sums) {
  const Problem& p = b.forward;
  Tensor memory;
  const Segments segments = cut_into_segments(
      ctx, *p.runs, p.x.size(1),
      choose_chunked(static_cast<std::int64_t>(p.runs->runs.size()), longest_run(p), in.heads, in.headdim),
      memory);
  const Tensor starts = ctx.empty({segments.count, in.heads, in.headdim, in.d_state});
  const Tensor decays = ctx.empty({segments.count, in.heads});
  const Dims states_of_chunks{chunks.count, in.heads, in.headdim, in.d_state};
  const Tensor states = ctx.empty(states_of_chunks, p.x.dtype());
  const Tensor gradients = ctx.empty(states_of_chunks, p.x.dtype());
  segment_decays(ctx, in, segments, decays);
  if (segments.per_run > 1) chunked_ends(ctx, in, segments, starts);
  pass_states(ctx, in, segments, decays, starts);
  chunk_states(ctx, in, segments, chunks, starts, states);
  if (segments.per_run > 1 || b.dinitial_states)
    chunked_gradient_ends(ctx, in, segments, b.dout, b.dinitial_states.defined(), starts);
  pass_gradients(ctx, in, segments, decays, b.dfinal_states, b.dinitial_states, starts);
  chunk_gradients(ctx, in, segments, chunks, b.dout, starts, gradients);
  chunked_backward(ctx, in, chunks, b.dout, states, gradients, to, sums);
}

// The same on products of warpgroups.
void backward_of_warpgroups(Context& ctx, const BackwardProblem& b, const Inputs& in, const Segments& chunks,
                            const Gradients& to, const Sums& sums) {
  const Problem& p = b.forward;
  Tensor memory;
  const Segments segments =
      cut_into_segments(ctx, *p.runs, p.x.size(1),
                        choose_warpgroup_walk(static_cast<std::int64_t>(p.runs->runs.size()), longest_run(p),
                                              in.heads, in.headdim),
                        memory);
  const Dims tiles{chunks.count, in.heads, in.headdim, warpgroup_columns(in.d_state)};
  StateTiles at{.starts = {},
                .ends = {},
                .states = ctx.empty(tiles, p.x.dtype()),
                .gradients = ctx.empty(tiles, p.x.dtype())};
  if (segments.per_run > 1) {
    const Dims states{segments.count, in.heads, in.headdim, in.d_state};
    const Tensor decays = ctx.empty({segments.count, in.heads});
    at.starts = ctx.empty(states);
    at.ends = ctx.empty(states);
    segment_decays(ctx, in, segments, decays);
    chunked_ends(ctx, in, segments, at.starts);
    pass_states(ctx, in, segments, decays, at.starts);
    chunked_gradient_ends(ctx, in, segments, b.dout, b.dinitial_states.defined(), at.ends);
    pass_gradients(ctx, in, segments, decays, b.dfinal_states, b.dinitial_states, at.ends);
  }
  warpgroup_states(ctx, in, segments, chunks, b, at);
  warpgroup_backward(ctx, in, chunks, b, at, to, sums);
}

}  // namespace

void run_cuda_backward(Context& ctx, const BackwardProblem& b) {
  const Problem& p = b.forward;
  const Inputs in(p);
  const cuda::DeviceLimits& limits = cuda::limits_of(ctx);
  const BackwardPath path = choose_backward_path(
      suits_tensor_cores(b), limits.compute_capability, cuda::has_warpgroup_products(ctx),
      limits.shared_memory_per_block,
      {.chunks = chunked_backward_shared_memory(),
       .warpgroups = std::max(warpgroup_backward_shared_memory(), warpgroup_states_shared_memory())});
  const bool chunked = path != BackwardPath::plain;
  const bool warpgroups = path == BackwardPath::warpgroups;
  Tensor memory;
  const Segments segments = cut_into_segments(ctx, *p.runs, p.x.size(1), kBackwardSegment, memory);
  Gradients to{.dx = AnyView<4>(b.dx), .dz = AnyView<4>(b.dz), .ddt = AnyView<3>(b.ddt)};
  const std::int64_t independent = segments.count * in.groups;
  Sums sums{.parts = warpgroups ? choose_warpgroup_parts(independent, in.heads_per_group)
                                : choose_parts(independent, in.heads_per_group, chunked ? 512 : 256),
            .stride = p.B.numel()};
  // Of dB and dC token_backward adds to what is there, and nobody writes those of tokens that are left out.
  Tensor dB, dC, dA, ddt_bias, dD;
  const auto room = [&](const Tensor& wanted, const Dims& shape, bool all_written, Tensor& memory_of,
                        float*& data) {
    if (!wanted) return;
    memory_of = all_written ? ctx.empty(shape) : ctx.zeros(shape);
    data = memory_of.data<float>();
  };
  const Dims parts{sums.parts, p.B.size(0), p.B.size(1), p.B.size(2), p.B.size(3)};
  const bool every_token = chunked && segments.padding_count == 0;
  const bool whole =
      warpgroups && sums.parts == 1 && in_pairs(b.dB, p.x.dtype()) && in_pairs(b.dC, p.x.dtype());
  if (whole) {
    to.dB = AnyView<4>(b.dB);
    to.dC = AnyView<4>(b.dC);
  } else {
    room(b.dB, parts, every_token, dB, sums.dB);
    room(b.dC, parts, every_token, dC, sums.dC);
  }
  room(b.dA, {segments.count, in.heads}, true, dA, sums.dA);
  room(b.ddt_bias, {segments.count, in.heads}, true, ddt_bias, sums.ddt_bias);
  room(b.dD, {segments.count, in.heads, chunked ? 1 : in.headdim}, true, dD, sums.dD);
  (warpgroups ? backward_of_warpgroups
   : chunked  ? backward_of_chunks
              : backward_of_segments)(ctx, b, in, segments, to, sums);

  Leftovers left{.parts = sums.parts,
                 .length = p.B.size(1),
                 .groups = in.groups,
                 .d_state = in.d_state,
                 .elements = p.B.numel(),
                 .segments = segments.count};
  const auto add_parts_to = [&](const Tensor& values, const Tensor& wanted) {
    if (wanted && !whole) left.of_parts[left.tensors++] = {values.data<float>(), AnyView<4>(wanted)};
  };
  add_parts_to(dB, b.dB);
  add_parts_to(dC, b.dC);
  if (left.tensors * left.elements > 0)
    left.blocks_of_parts = cuda::blocks_for(ctx, left.tensors * left.elements / in.d_state, kWarps);
  std::int64_t blocks = left.blocks_of_parts;
  int sets = 0;
  const auto add_segments_to = [&](const Tensor& values, const Tensor& wanted) {
    if (!wanted || values.numel() == 0) return;
    const Tensor matrix = wanted.ndim() == 2 ? wanted : wanted.unsqueeze(1);
    const std::int64_t count = matrix.numel();
    left.of_segments[sets++] = {.values = values.data<float>(),
                                .width = values.numel() / segments.count / count,
                                .count = count,
                                .columns = matrix.size(1),
                                .to = AnyView<2>(matrix)};
    blocks += count;
  };
  add_segments_to(dA, b.dA);
  add_segments_to(ddt_bias, b.ddt_bias);
  add_segments_to(dD, b.dD);
  if (blocks > 0)
    cuda::launch(ctx, "ssd_backward sums", add_up_kernel, static_cast<unsigned>(blocks), kThreads, 0, left);
  for (const Tensor* t : {&b.dx, &b.dz, whole ? &b.dB : nullptr, whole ? &b.dC : nullptr})
    if (t != nullptr && *t) clear_padding(ctx, segments, *t);
  if (b.ddt) clear_padding(ctx, segments, b.ddt.unsqueeze(3));
}

}  // namespace krait::ssd_detail
