// The backward as the recurrence has it, f32 throughout, for any shape, strides and dtypes. Segments of
// kSegment tokens are worked on side by side: the state before each and the gradient by the state after each
// are there. Within a segment the states before every kTile tokens are computed again and kept in shared
// memory, those between them in registers, so that every product of the definition is formed as it stands.
#include <algorithm>

#include "core/cuda/backend.h"
#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
#ifdef __HIP_PLATFORM_AMD__
constexpr int kSegment = 32;  // a block has 64 KB of shared memory
#else
constexpr int kSegment = kChunk;  // that of the kernels on tensor cores
#endif
constexpr int kTile = 8;
constexpr int kTiles = kSegment / kTile;
constexpr int kRows = 16;   // of the state, in a block: one for each two lanes of a warp
constexpr int kValues = 8;  // elements of a row in a thread
constexpr int kSlice = kWarps * 2 * kValues;

struct alignas(16) Shared {
  // Large terms cancel in the gradient by d A, and in its sum.
  double exponent[kSegment];
  double overlap[kTile][kWarps];                // <G_t, S_{t-1}> of the warps
  float checkpoint[kTiles][kValues][kThreads];  // the state before each tile
  float B[kTile][kSlice];
  float C[kTile][kSlice];
  float x[kSegment][kRows];
  float dy[kSegment][kRows];
  float y[kSegment][kRows];          // S C, and
  float v[kSegment][kRows];          // G B: summed over slices
  float part[kTile][kWarps][kRows];  // y or v of the warps
  float d[kSegment];
  float decay[kSegment];
  float slope[kSegment];
  float dd[kSegment];  // sum over rows of x v
  float sums[33];
};
#ifdef __HIP_PLATFORM_AMD__
static_assert(sizeof(Shared) <= 64 * 1024);
#endif

// Sums over the 16 rows of a warp (lane bits 1 to 4) of 8 values in each lane. The sum of value k is left in
// the lanes whose bits 4, 3 and 2 are those of k.
__device__ __forceinline__ float sum_of_rows(float (&v)[kValues]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const unsigned mask = static_cast<unsigned>(half) * 4;
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float given = upper ? v[k] : v[k + half];
      const float kept = upper ? v[k + half] : v[k];
      v[k] = kept + __shfl_xor_sync(0xffffffffU, given, mask);
    }
  }
  return v[0] + __shfl_xor_sync(0xffffffffU, v[0], 2);
}

__device__ __forceinline__ void load_values(const float* from, float (&to)[kValues]) {
#pragma unroll
  for (int k = 0; k < kValues; k += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + k);
    to[k] = v.x;
    to[k + 1] = v.y;
    to[k + 2] = v.z;
    to[k + 3] = v.w;
  }
}

__device__ __forceinline__ double warp_sum(double v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffU, v, step);
  return v;
}

// A block for each segment, group and block of heads of the group.
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Inputs in, Segments segments, AnyView<4> dout, const float* starts, const float* ends,
                    Gradients to, Sums sums) {
  extern __shared__ float4 shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int row = lane / 2;
  const int column = (warp * 2 + lane % 2) * kValues;  // the first of the thread's
  const int summed_column = column + (lane & 16) / 4 + (lane & 8) / 4 + (lane & 4) / 4;
  const std::int64_t row_tiles = (in.headdim + kRows - 1) / kRows;
  const std::int64_t slices = (in.d_state + kSlice - 1) / kSlice;
  const std::int64_t heads_of_part = (in.heads_per_group + sums.parts - 1) / sums.parts;
  const std::int64_t total = segments.count * in.groups * sums.parts;

  for (std::int64_t block = blockIdx.x; block < total; block += gridDim.x) {
    const std::int64_t s = block / (in.groups * sums.parts);
    const std::int64_t group = block / sums.parts % in.groups;
    const std::int64_t part = block % sums.parts;
    const Segment segment = segments.at(s);
    const int count = static_cast<int>(segment.count);
    const int tiles = (count + kTile - 1) / kTile;
    const std::int64_t last_head = min((part + 1) * heads_of_part, in.heads_per_group);

    for (std::int64_t h = part * heads_of_part; h < last_head; ++h) {
      const std::int64_t head = group * in.heads_per_group + h;
      __syncthreads();
      if (thread < kSegment) {
        // Tokens that only fill a tile leave everything as it is.
        Step step;
        if (thread < count) step = step_of(in, segment.row, segments.position(segment, thread), head);
        shared.d[thread] = step.d;
        shared.decay[thread] = expf(step.exponent);
        shared.slope[thread] = step.slope;
        shared.exponent[thread] = 0.0;
        shared.dd[thread] = 0.0F;
      }

      for (std::int64_t row0 = 0; row0 < row_tiles * kRows; row0 += kRows) {
        __syncthreads();
        for (int i = thread; i < kSegment * kRows; i += kThreads) {
          const int t = i / kRows;
          const std::int64_t p = row0 + i % kRows;
          float x = 0.0F;
          float dy = 0.0F;
          if (t < count && p < in.headdim) {
            const std::int64_t position = segments.position(segment, t);
            x = in.x.load(segment.row, position, head, p);
            dy = dout.load(segment.row, position, head, p);
            if (in.z) dy *= cuda::silu(in.z.load(segment.row, position, head, p));
          }
          shared.x[t][i % kRows] = x;
          shared.dy[t][i % kRows] = dy;
          shared.y[t][i % kRows] = 0.0F;
          shared.v[t][i % kRows] = 0.0F;
        }

        for (std::int64_t slice = 0; slice < slices; ++slice) {
          const std::int64_t column0 = slice * kSlice;
          const auto stage = [&](int tile) {
            for (int i = thread; i < kTile * kSlice; i += kThreads) {
              const int t = tile * kTile + i / kSlice;
              const std::int64_t n = column0 + i % kSlice;
              float b = 0.0F;
              float c = 0.0F;
              if (t < count && n < in.d_state) {
                const std::int64_t position = segments.position(segment, t);
                b = in.B.load(segment.row, position, group, n);
                c = in.C.load(segment.row, position, group, n);
              }
              shared.B[i / kSlice][i % kSlice] = b;
              shared.C[i / kSlice][i % kSlice] = c;
            }
          };
          const std::int64_t state =
              ((s * in.heads + head) * in.headdim + row0 + row) * in.d_state + column0 + column;
          const auto load_state = [&](const float* from, float(&values)[kValues]) {
#pragma unroll
            for (int k = 0; k < kValues; ++k)
              values[k] =
                  row0 + row < in.headdim && column0 + column + k < in.d_state ? from[state + k] : 0.0F;
          };

          // Forward, for the states before the tiles, and for y.
          float S[kValues];
          load_state(starts, S);
          for (int tile = 0; tile < tiles; ++tile) {
            __syncthreads();
            stage(tile);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kValues; ++k) shared.checkpoint[tile][k][thread] = S[k];
#pragma unroll
            for (int i = 0; i < kTile; ++i) {
              const int t = tile * kTile + i;
              const float decay = shared.decay[t];
              const float u = shared.d[t] * shared.x[t][row];
              float b[kValues];
              load_values(&shared.B[i][column], b);
#pragma unroll
              for (int k = 0; k < kValues; ++k) S[k] = fmaf(decay, S[k], u * b[k]);
              if (to.dz) {
                float c[kValues];
                load_values(&shared.C[i][column], c);
                float y = 0.0F;
#pragma unroll
                for (int k = 0; k < kValues; ++k) y = fmaf(S[k], c[k], y);
                y += __shfl_xor_sync(0xffffffffU, y, 1);
                if (lane % 2 == 0) shared.part[i][warp][row] = y;
              }
            }
            if (to.dz) {
              __syncthreads();
              if (thread < kTile * kRows)
                for (int w = 0; w < kWarps; ++w)
                  shared.y[tile * kTile + thread / kRows][thread % kRows] +=
                      shared.part[thread / kRows][w][thread % kRows];
            }
          }

          // Backward.
          float G[kValues];
          load_state(ends, G);
          for (int tile = tiles - 1; tile >= 0; --tile) {
            __syncthreads();
            stage(tile);
            __syncthreads();
            float before[kTile + 1][kValues];  // the state before each token; the last: after all
#pragma unroll
            for (int k = 0; k < kValues; ++k) before[0][k] = shared.checkpoint[tile][k][thread];
#pragma unroll
            for (int i = 0; i < kTile; ++i) {
              const int t = tile * kTile + i;
              const float decay = shared.decay[t];
              const float u = shared.d[t] * shared.x[t][row];
              float b[kValues];
              load_values(&shared.B[i][column], b);
#pragma unroll
              for (int k = 0; k < kValues; ++k) before[i + 1][k] = fmaf(decay, before[i][k], u * b[k]);
            }
#pragma unroll
            for (int i = kTile - 1; i >= 0; --i) {
              const int t = tile * kTile + i;
              const float decay = shared.decay[t];
              const float u = shared.d[t] * shared.x[t][row];
              const float dy = shared.dy[t][row];
              float b[kValues];
              float c[kValues];
              load_values(&shared.B[i][column], b);
              load_values(&shared.C[i][column], c);
              float dB[kValues];
              float dC[kValues];
              float v = 0.0F;
              float overlap = 0.0F;
#pragma unroll
              for (int k = 0; k < kValues; ++k) {
                G[k] = fmaf(dy, c[k], G[k]);
                v = fmaf(G[k], b[k], v);
                overlap = fmaf(G[k], before[i][k], overlap);
                dB[k] = u * G[k];
                dC[k] = dy * before[i + 1][k];
                G[k] *= decay;
              }
              v += __shfl_xor_sync(0xffffffffU, v, 1);
              if (lane % 2 == 0) shared.part[i][warp][row] = v;
              const double overlap_of_warp = warp_sum(static_cast<double>(overlap));
              if (lane == 0) shared.overlap[i][warp] = overlap_of_warp;
              // Each thread adds to elements of its own, for all heads and rows of the block in turn.
              const float sum_B = sum_of_rows(dB);
              const float sum_C = sum_of_rows(dC);
              float* sum = (lane & 2) == 0 ? sums.dB : sums.dC;
              if (sum != nullptr && t < count && column0 + summed_column < in.d_state) {
                const std::int64_t token = segment.row * segments.length + segments.position(segment, t);
                sum +=
                    part * sums.stride + (token * in.groups + group) * in.d_state + column0 + summed_column;
                *sum += (lane & 2) == 0 ? sum_B : sum_C;
              }
            }
            __syncthreads();
            if (thread < kTile * kRows) {
              float& v = shared.v[tile * kTile + thread / kRows][thread % kRows];
              for (int w = 0; w < kWarps; ++w) v += shared.part[thread / kRows][w][thread % kRows];
            } else if (thread < kTile * kRows + kTile) {
              const int i = thread - kTile * kRows;
              const int t = tile * kTile + i;
              double sum = 0.0;
              for (int w = 0; w < kWarps; ++w) sum += shared.overlap[i][w];
              shared.exponent[t] += static_cast<double>(shared.decay[t]) * sum;
            }
          }
        }

        __syncthreads();
        for (int i = thread; i < count * kRows; i += kThreads) {
          const int t = i / kRows;
          const std::int64_t p = row0 + i % kRows;
          if (p >= in.headdim) continue;
          const std::int64_t position = segments.position(segment, t);
          const float skip = in.D ? in.D.load(head, p) : 0.0F;
          if (to.dx)
            to.dx.store(fmaf(shared.d[t], shared.v[t][i % kRows], skip * shared.dy[t][i % kRows]),
                        segment.row, position, head, p);
          if (to.dz) {
            const float z = in.z.load(segment.row, position, head, p);
            const float sigmoid = cuda::sigmoid(z);
            const float y = fmaf(skip, shared.x[t][i % kRows], shared.y[t][i % kRows]);
            const float gradient = dout.load(segment.row, position, head, p);
            to.dz.store(gradient * y * sigmoid * (1.0F + z * (1.0F - sigmoid)), segment.row, position, head,
                        p);
          }
        }
        if (thread < kSegment) {
          float sum = shared.dd[thread];
          for (int r = 0; r < kRows; ++r) sum = fmaf(shared.x[thread][r], shared.v[thread][r], sum);
          shared.dd[thread] = sum;
        } else if (thread < kSegment + kRows && sums.dD != nullptr) {
          const int r = thread - kSegment;
          float sum = 0.0F;
          for (int t = 0; t < count; ++t) sum = fmaf(shared.x[t][r], shared.dy[t][r], sum);
          if (row0 + r < in.headdim) sums.dD[(s * in.heads + head) * in.headdim + row0 + r] = sum;
        }
      }

      // A token's values are its own thread's.
      double dA = 0.0;
      float dd = 0.0F;
      if (thread < count) {
        dA = static_cast<double>(shared.d[thread]) * shared.exponent[thread];
        dd = fmaf(in.A.load(head), static_cast<float>(shared.exponent[thread]), shared.dd[thread]) *
             shared.slope[thread];
        if (to.ddt) to.ddt.store(dd, segment.row, segments.position(segment, thread), head);
      }
      dA = warp_sum(dA);
      if (lane == 0 && warp < 2) shared.overlap[0][warp] = dA;
      dd = cuda::block_sum(dd, shared.sums);
      if (thread == 0 && sums.dA != nullptr)
        sums.dA[s * in.heads + head] = static_cast<float>(shared.overlap[0][0] + shared.overlap[0][1]);
      if (thread == 0 && sums.ddt_bias != nullptr) sums.ddt_bias[s * in.heads + head] = dd;
    }
  }
}

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

}  // namespace

namespace {

std::int64_t longest_run(const Problem& p) {
  std::int64_t longest = 0;
  for (const TokenRun& run : p.runs->runs) longest = std::max(longest, run.count);
  return longest;
}

// The gradients of all segments by the plain kernel.
void plain_backward(Context& ctx, const BackwardProblem& b, const Inputs& in, const Segments& segments,
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
  const std::int64_t blocks = segments.count * in.groups * sums.parts;
  if (blocks > 0 && in.heads > 0)
    cuda::launch(ctx, "ssd_backward by tokens", backward_kernel,
                 static_cast<unsigned>(std::min<std::int64_t>(blocks, std::int64_t{1} << 30)), kThreads,
                 sizeof(Shared), in, segments, AnyView<4>(b.dout), starts.data<float>(), ends.data<float>(),
                 to, sums);
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

// Whether blocks may write two neighbours of `t`, absent or in `dtype`, at once.
bool in_pairs(const Tensor& t, DType dtype) {
  if (!t) return true;
  return t.dtype() == dtype && t.stride(3) == 1 && t.stride(0) % 2 == 0 && t.stride(1) % 2 == 0 &&
         t.stride(2) % 2 == 0 && reinterpret_cast<std::uintptr_t>(t.raw()) % 4 == 0;
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
  const Segments segments = cut_into_segments(ctx, *p.runs, p.x.size(1), kSegment, memory);
  Gradients to{.dx = AnyView<4>(b.dx), .dz = AnyView<4>(b.dz), .ddt = AnyView<3>(b.ddt)};
  const std::int64_t independent = segments.count * in.groups;
  Sums sums{.parts = warpgroups ? choose_warpgroup_parts(independent, in.heads_per_group)
                                : choose_parts(independent, in.heads_per_group, chunked ? 512 : 256),
            .stride = p.B.numel()};
  // Of dB and dC the plain kernel adds to what is there, and nobody writes those of tokens that are left out.
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
              : plain_backward)(ctx, b, in, segments, to, sums);

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
