// The backward as the recurrence has it, f32 throughout, for any shape, strides and dtypes. Segments of
// kSegment tokens are worked on side by side: the state before each and the gradient by the state after each
// are there. Within a segment the states before every kTile tokens are computed again and kept in shared
// memory, those between them in registers, so that every product of the definition is formed as it stands.
#include <algorithm>

#include "ops/ssd/cuda/backward.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSegment = kBackwardSegment;
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

}  // namespace

void token_backward(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& dout,
                    const Tensor& starts, const Tensor& ends, const Gradients& to, const Sums& sums) {
  const std::int64_t blocks = segments.count * in.groups * sums.parts;
  if (blocks > 0 && in.heads > 0)
    cuda::launch(ctx, "ssd_backward by tokens", backward_kernel,
                 static_cast<unsigned>(std::min<std::int64_t>(blocks, std::int64_t{1} << 30)), kThreads,
                 sizeof(Shared), in, segments, AnyView<4>(dout), starts.data<float>(), ends.data<float>(), to,
                 sums);
}

}  // namespace krait::ssd_detail
