// The recurrence as it is written: tokens in order, the state in registers. Any shape, strides and dtypes,
// f32 throughout. One kernel walks three ways: forward with outputs, forward for the state that a segment
// ends with, and backward for the gradient by the state before it.
#include <algorithm>

#include "ops/ssd/cuda/inputs.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;    // threads that share rows of the state
constexpr int kValues = 16;  // elements of a row in each
constexpr int kSlice = kLanes * kValues;
constexpr int kRowsOfThread = 2;
constexpr int kRows = kThreads / kLanes * kRowsOfThread;  // of the state, in a block
constexpr int kTokens = 16;                               // staged in shared memory together

enum class Walk { outputs, ends, gradient_ends };

// Where outputs go.
struct Outputs {
  AnyView<4> out;
  AnyView<4> final_states;
  AnyView<5> states;
  float* sums = nullptr;  // (B, L, H, P): y of the slices so far, where N takes several
};

struct alignas(16) Staged {
  float u[kTokens][kRows];   // the factor of a row: d x, or dy where gradients are walked
  float v[kTokens][kSlice];  // the factor of a column: B, or C
  float C[kTokens][kSlice];
  float x[kTokens][kRows];
  float decay[kTokens];
  std::int64_t position[kTokens];
};

// Column k of the thread's share of a slice: lanes that follow one another read 16 bytes each.
__device__ __forceinline__ int column_of(int lane, int k) { return k / 4 * (4 * kLanes) + lane * 4 + k % 4; }

template <Walk kWalk>
__device__ void stage(const Inputs& in, const Segments& segments, const Segment& segment,
                      const AnyView<4>& dout, std::int64_t head, std::int64_t row0, std::int64_t column0,
                      std::int64_t begin, int count, Staged& staged) {
  constexpr bool kBackward = kWalk == Walk::gradient_ends;
  const std::int64_t group = head / in.heads_per_group;
  const int thread = static_cast<int>(threadIdx.x);
  // Token i of the walk; gradients are walked from the segment's last token.
  const auto position_of = [&](int i) {
    return segments.position(segment, kBackward ? segment.count - 1 - begin - i : begin + i);
  };
  for (int i = thread; i < count * kSlice; i += kThreads) {
    const int t = i / kSlice;
    const std::int64_t n = column0 + i % kSlice;
    const std::int64_t position = position_of(t);
    const bool inside = n < in.d_state;
    const AnyView<4>& columns = kBackward ? in.C : in.B;
    staged.v[t][i % kSlice] = inside ? columns.load(segment.row, position, group, n) : 0.0F;
    if constexpr (kWalk == Walk::outputs)
      staged.C[t][i % kSlice] = inside ? in.C.load(segment.row, position, group, n) : 0.0F;
  }
  for (int i = thread; i < count * kRows; i += kThreads) {
    const int t = i / kRows;
    const std::int64_t p = row0 + i % kRows;
    const std::int64_t position = position_of(t);
    float value = 0.0F;
    if (p < in.headdim) {
      if constexpr (kBackward) {
        value = dout.load(segment.row, position, head, p);
        if (in.z) value *= cuda::silu(in.z.load(segment.row, position, head, p));
      } else {
        const float x = in.x.load(segment.row, position, head, p);
        if constexpr (kWalk == Walk::outputs) staged.x[t][i % kRows] = x;
        value = step_of(in, segment.row, position, head).d * x;
      }
    }
    staged.u[t][i % kRows] = value;
  }
  if (thread < count) {
    const std::int64_t position = position_of(thread);
    staged.decay[thread] = expf(step_of(in, segment.row, position, head).exponent);
    staged.position[thread] = position;
  }
}

// A block for each segment, head and kRows rows of the state.
template <Walk kWalk>
__global__ void __launch_bounds__(kThreads)
    walk_kernel(Inputs in, Segments segments, AnyView<4> dout, bool initial_gradient, const float* starts,
                float* ends, Outputs to) {
  __shared__ Staged staged;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int first_row = static_cast<int>(threadIdx.x) / kLanes * kRowsOfThread;
  const std::int64_t row_tiles = (in.headdim + kRows - 1) / kRows;
  const std::int64_t slices = in.d_state <= kSlice ? 1 : (in.d_state + kSlice - 1) / kSlice;
  const std::int64_t total = segments.count * in.heads * row_tiles;

  for (std::int64_t block = blockIdx.x; block < total; block += gridDim.x) {
    const std::int64_t s = block / (in.heads * row_tiles);
    const std::int64_t head = block / row_tiles % in.heads;
    const std::int64_t row0 = block % row_tiles * kRows;
    const Segment segment = segments.at(s);
    if (kWalk == Walk::ends && segment.run_ends) continue;
    if (kWalk == Walk::gradient_ends && segment.run_begins && !(segment.initial && initial_gradient))
      continue;
    const std::int64_t of_head = (s * in.heads + head) * in.headdim;

    for (std::int64_t slice = 0; slice < slices; ++slice) {
      const std::int64_t column0 = slice * kSlice;
      float S[kRowsOfThread][kValues] = {};
      // f(row, column, value) for what the thread has of the state.
      const auto each = [&](const auto& f) {
#pragma unroll
        for (int r = 0; r < kRowsOfThread; ++r) {
#pragma unroll
          for (int k = 0; k < kValues; ++k) {
            const std::int64_t p = row0 + first_row + r;
            const std::int64_t n = column0 + column_of(lane, k);
            if (p < in.headdim && n < in.d_state) f(p, n, S[r][k]);
          }
        }
      };
      if constexpr (kWalk == Walk::outputs) {
        if (starts != nullptr)
          each([&](std::int64_t p, std::int64_t n, float& v) { v = starts[(of_head + p) * in.d_state + n]; });
        else if (segment.initial && in.initial)
          each([&](std::int64_t p, std::int64_t n, float& v) {
            v = in.initial.load(segment.sequence, head, p, n);
          });
      }
      std::int64_t request = segment.requests_begin;
      const auto save_requested = [&](std::int64_t done) {
        for (; request < segment.requests_end && segments.requests[request].count == done; ++request) {
          const StateRequest wanted = segments.requests[request];
          each([&](std::int64_t p, std::int64_t n, float v) {
            to.states.store(v, wanted.row, wanted.slot, head, p, n);
          });
        }
      };
      if constexpr (kWalk == Walk::outputs) save_requested(0);

      for (std::int64_t begin = 0; begin < segment.count; begin += kTokens) {
        const int count = static_cast<int>(min(std::int64_t{kTokens}, segment.count - begin));
        __syncthreads();  // all have done with what was staged before
        stage<kWalk>(in, segments, segment, dout, head, row0, column0, begin, count, staged);
        __syncthreads();
        for (int t = 0; t < count; ++t) {
          const float decay = staged.decay[t];
          float y[kRowsOfThread] = {};
#pragma unroll
          for (int k = 0; k < kValues; k += 4) {
            const int column = column_of(lane, k);
            const float4 v = *reinterpret_cast<const float4*>(&staged.v[t][column]);
            float4 c{};
            if constexpr (kWalk == Walk::outputs) c = *reinterpret_cast<const float4*>(&staged.C[t][column]);
#pragma unroll
            for (int r = 0; r < kRowsOfThread; ++r) {
              const float u = staged.u[t][first_row + r];
              float* state = &S[r][k];
              if constexpr (kWalk == Walk::gradient_ends) {
                state[0] = decay * fmaf(u, v.x, state[0]);
                state[1] = decay * fmaf(u, v.y, state[1]);
                state[2] = decay * fmaf(u, v.z, state[2]);
                state[3] = decay * fmaf(u, v.w, state[3]);
              } else {
                state[0] = fmaf(decay, state[0], u * v.x);
                state[1] = fmaf(decay, state[1], u * v.y);
                state[2] = fmaf(decay, state[2], u * v.z);
                state[3] = fmaf(decay, state[3], u * v.w);
              }
              if constexpr (kWalk == Walk::outputs)
                y[r] =
                    fmaf(state[0], c.x, fmaf(state[1], c.y, fmaf(state[2], c.z, fmaf(state[3], c.w, y[r]))));
            }
          }
          if constexpr (kWalk == Walk::outputs) {
#pragma unroll
            for (int r = 0; r < kRowsOfThread; ++r)
              for (int step = kLanes / 2; step > 0; step /= 2)
                y[r] += __shfl_xor_sync(0xffffffffU, y[r], step);
            const std::int64_t p = row0 + first_row + lane;
            if (lane < kRowsOfThread && p < in.headdim) {
              float value = lane == 0 ? y[0] : y[1];
              const std::int64_t position = staged.position[t];
              if (slices > 1) {
                float& sum =
                    to.sums[((segment.row * segments.length + position) * in.heads + head) * in.headdim + p];
                if (slice > 0) value += sum;
                if (slice < slices - 1) sum = value;
              }
              if (slice == slices - 1) {
                if (in.D) value = fmaf(in.D.load(head, p), staged.x[t][first_row + lane], value);
                if (in.z) value *= cuda::silu(in.z.load(segment.row, position, head, p));
                to.out.store(value, segment.row, position, head, p);
              }
            }
            save_requested(begin + t + 1);
          }
        }
      }

      if constexpr (kWalk == Walk::outputs) {
        if (segment.final && to.final_states)
          each([&](std::int64_t p, std::int64_t n, float v) {
            to.final_states.store(v, segment.sequence, head, p, n);
          });
      } else {
        each([&](std::int64_t p, std::int64_t n, float v) { ends[(of_head + p) * in.d_state + n] = v; });
      }
    }
  }
}

template <Walk kWalk>
void walk(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& dout, bool initial_gradient,
          const float* starts, float* ends, const Outputs& to) {
  const std::int64_t blocks = segments.count * in.heads * ((in.headdim + kRows - 1) / kRows);
  if (blocks == 0) return;
  cuda::launch(ctx, "ssd by tokens", walk_kernel<kWalk>,
               static_cast<unsigned>(std::min<std::int64_t>(blocks, std::int64_t{1} << 30)), kThreads, 0, in,
               segments, AnyView<4>(dout), initial_gradient, starts, ends, to);
}

}  // namespace

void walk_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& ends) {
  walk<Walk::ends>(ctx, in, segments, {}, false, nullptr, ends.data<float>(), {});
}

void walk_gradient_ends(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& dout,
                        bool initial, const Tensor& ends) {
  walk<Walk::gradient_ends>(ctx, in, segments, dout, initial, nullptr, ends.data<float>(), {});
}

void walk_outputs(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& starts,
                  const Problem& p) {
  Outputs to{
      .out = AnyView<4>(p.out), .final_states = AnyView<4>(p.final_states), .states = AnyView<5>(p.states)};
  Tensor sums;
  if (in.d_state > kSlice) {
    sums = ctx.empty(p.x.shape());
    to.sums = sums.data<float>();
  }
  walk<Walk::outputs>(ctx, in, segments, {}, false, starts ? starts.data<float>() : nullptr, nullptr, to);
}

}  // namespace krait::ssd_detail
