// projection in one kernel. Every block normalises the rows of x for itself, which is less than a kernel of
// its own would cost; the convolution's channels are columns, each of which one thread computes.
#include "core/cuda/vectors.cuh"
#include "ops/linear/cuda/few_rows.cuh"
#include "ops/projection/kernels.h"

namespace krait::projection_detail {
namespace {

using linear_detail::FewRowsPlan;
using linear_detail::FewRowsWeights;
using linear_detail::kFewRowsThreads;
using linear_detail::kFewRowsWarps;

constexpr int kQuads = 8;  // of neighbours along a row that a thread holds at most

constexpr int kEarlyQuads = 3;  // of the norm's weight

template <typename T>
struct alignas(8) Quad {
  T v[4];
};
template <typename T>
__device__ __forceinline__ void load_quad(const T* from, float (&to)[4]) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = cuda::to_float(quad.v[i]);
}

// The sum over the block, in a fixed order; two halves of `scratch` take turns.
class BlockSum {
 public:
  __device__ explicit BlockSum(float* scratch) : scratch_(scratch) {}
  __device__ __forceinline__ float operator()(float v) {
    float* const own = scratch_ + turn_ * kFewRowsWarps;
    turn_ ^= 1;
    v = cuda::warp_sum(v);
    if (threadIdx.x % 32 == 0) own[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0.0F;
#pragma unroll
    for (int w = 0; w < kFewRowsWarps; ++w) v += own[w];
    return v;
  }

 private:
  float* scratch_;
  int turn_ = 0;
};

// norm(x + residual), or with a gate norm(x) silu(z) or norm(x silu(z)).
template <typename T, bool kGate>
struct NormedInput {
  const T* x = nullptr;
  std::int64_t x_stride = 0;
  const float* residual = nullptr;
  std::int64_t residual_stride = 0;
  const T* z = nullptr;
  std::int64_t z_stride = 0;
  const float* weight = nullptr;
  const float* bias = nullptr;
  float* residual_out = nullptr;  // contiguous
  float eps = 0.0F;
  bool layer = false;
  bool norm_before_gate = false;

  struct Early {
    float4 weight[kEarlyQuads];  // of the first quads; those of longer rows are read when they are needed
  };
  __device__ float4 weight_of(const FewRowsWeights& p, int k) const {
    return weight != nullptr && k < p.in ? *reinterpret_cast<const float4*>(weight + k)
                                         : float4{1.0F, 1.0F, 1.0F, 1.0F};
  }
  __device__ Early early(const FewRowsWeights& p) const {
    Early e;
#pragma unroll
    for (int i = 0; i < kEarlyQuads; ++i)
      e.weight[i] = weight_of(p, (static_cast<int>(threadIdx.x) + i * kFewRowsThreads) * 4);
    return e;
  }

  __device__ void stage(const FewRowsWeights& p, const Early& e, T* to) const {
    __shared__ float scratch[2 * kFewRowsWarps];
    BlockSum sum_up(scratch);
    const auto place = [](int i) { return (static_cast<int>(threadIdx.x) + i * kFewRowsThreads) * 4; };
    const auto count = static_cast<float>(p.in);
    for (int r = 0; r < p.rows; ++r) {
      float v[kQuads][4];
      float gate[kGate ? kQuads : 1][4];
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (i * kFewRowsThreads * 4 >= p.in) break;
        const int k = place(i);
        if (k < p.in) {
          load_quad(x + r * x_stride + k, v[i]);
          if constexpr (kGate) {
            load_quad(z + r * z_stride + k, gate[i]);
          } else if (residual != nullptr) {
            const float4 other = *reinterpret_cast<const float4*>(residual + r * residual_stride + k);
            v[i][0] += other.x;
            v[i][1] += other.y;
            v[i][2] += other.z;
            v[i][3] += other.w;
          }
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) v[i][j] = 0.0F;
          if constexpr (kGate) {
#pragma unroll
            for (int j = 0; j < 4; ++j) gate[i][j] = 0.0F;
          }
        }
      }
      float mean = 0.0F;
      float square = 0.0F;
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (i * kFewRowsThreads * 4 >= p.in) break;
        if constexpr (kGate) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            gate[i][j] = cuda::quick_silu(gate[i][j]);
            if (!norm_before_gate) v[i][j] *= gate[i][j];
          }
        } else if (residual_out != nullptr && place(i) < p.in &&
                   static_cast<int>(threadIdx.x / 32 + kFewRowsWarps * i) % static_cast<int>(gridDim.x) ==
                       static_cast<int>(blockIdx.x)) {
          // Each warp's part is written by another block.
          *reinterpret_cast<float4*>(residual_out + std::int64_t{r} * p.in + place(i)) = {v[i][0], v[i][1],
                                                                                          v[i][2], v[i][3]};
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          mean += v[i][j];
          square = fmaf(v[i][j], v[i][j], square);
        }
      }
      if (layer) {
        mean = sum_up(mean) / count;
        square = 0.0F;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          if (i * kFewRowsThreads * 4 >= p.in) break;
          if (place(i) < p.in) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              v[i][j] -= mean;
              square = fmaf(v[i][j], v[i][j], square);
            }
          }
        }
      }
      const float rstd = 1.0F / sqrtf(sum_up(square) / count + eps);
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (i * kFewRowsThreads * 4 >= p.in) break;
        const int k = place(i);
        if (k >= p.in) continue;
        const float4 w = i < kEarlyQuads ? e.weight[i < kEarlyQuads ? i : 0] : weight_of(p, k);
        float n[4] = {v[i][0] * (rstd * w.x), v[i][1] * (rstd * w.y), v[i][2] * (rstd * w.z),
                      v[i][3] * (rstd * w.w)};
        if (bias != nullptr) {
          const float4 shift = *reinterpret_cast<const float4*>(bias + k);
          n[0] += shift.x;
          n[1] += shift.y;
          n[2] += shift.z;
          n[3] += shift.w;
        }
        Quad<T> rounded;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (kGate)
            if (norm_before_gate) n[j] *= gate[i][j];
          rounded.v[j] = cuda::from_float<T>(n[j]);
        }
        *reinterpret_cast<Quad<T>*>(to + r * p.x_stride + k) = rounded;
      }
      for (int k = p.in + static_cast<int>(threadIdx.x) * 4; k < p.padded_in(); k += kFewRowsThreads * 4)
        *reinterpret_cast<uint2*>(to + r * p.x_stride + k) = uint2{0, 0};
    }
    __syncthreads();
  }
};

// Columns with a convolution of 4 taps over some of them.
template <typename T>
struct ConvOutput {
  linear_detail::PlainOutput plain;  // whose out is of T
  int first = 0;
  int channels = 0;
  const float* weight = nullptr;  // (D, 4) contiguous
  const float* bias = nullptr;
  float* state = nullptr;
  std::int64_t stride[3] = {};
  std::int64_t state_rows = 0;
  cuda::IndexView indices;
  T* convolved = nullptr;  // (B, D) contiguous
  bool silu = true;

  struct Early {
    float plain;
    float4 weight;
    float bias;
    std::int64_t row;
  };
  struct Late {
    float before[3];
  };
  __device__ bool covers(int column) const { return column >= first && column < first + channels; }
  __device__ bool is_row(std::int64_t row) const { return row >= 0 && row < state_rows; }
  __device__ float* window(std::int64_t row, int channel) const {
    return state + row * stride[0] + channel * stride[1];
  }
  __device__ Early early(int b, int column) const {
    Early e{.plain = plain.early(b, column)};
    if (!covers(column)) return e;
    const int channel = column - first;
    e.weight = reinterpret_cast<const float4*>(weight)[channel];
    e.bias = bias != nullptr ? bias[channel] : 0.0F;
    e.row = indices ? indices(b) : b;
    return e;
  }
  __device__ Late late(const Early& e, int /*b*/, int column) const {
    Late l{};
    if (!covers(column) || !is_row(e.row)) return l;
    const float* from = window(e.row, column - first);
#pragma unroll
    for (int k = 0; k < 3; ++k) l.before[k] = from[k * stride[2]];
    return l;
  }
  __device__ void store(const Early& e, const Late& l, int b, int column, float sum) const {
    const T value = cuda::from_float<T>(sum + e.plain);
    plain.out.store(cuda::to_float(value), b, column);
    if (!covers(column)) return;
    const int channel = column - first;
    float y = 0.0F;
    if (is_row(e.row)) {
      const float now = cuda::to_float(value);
      y = fmaf(e.weight.x, l.before[0], e.bias);
      y = fmaf(e.weight.y, l.before[1], y);
      y = fmaf(e.weight.z, l.before[2], y);
      y = fmaf(e.weight.w, now, y);
      if (silu) y *= 1.0F / (1.0F + expf(-y));
      float* const to = window(e.row, channel);
      to[0] = l.before[1];
      to[stride[2]] = l.before[2];
      to[2 * stride[2]] = now;
    }
    convolved[std::int64_t{b} * channels + channel] = cuda::from_float<T>(y);
  }
};

bool aligned(const Tensor& t, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(t.raw()) % bytes == 0;
}
// Rows whose quads can be read at once.
bool in_quads(const Tensor& t, DType dtype) {
  return t.dtype() == dtype && t.stride(1) == 1 && (t.size(0) == 1 || t.stride(0) % 4 == 0) &&
         aligned(t, 4 * size_of(dtype));
}
bool vector_of_f32(const Tensor& t) {
  return !t || (t.dtype() == DType::f32 && t.is_contiguous() && aligned(t, 16));
}

bool norm_fits(const ProjectionArgs& args) {
  const ProjectionInput& in = args.input;
  const std::int64_t width = args.x.size(1);
  if (in.norm == ProjectionNorm::none || width > kQuads * 4 * kFewRowsThreads) return false;
  if (in.group_size != 0 && in.group_size != width) return false;
  if (in.weight && in.weight.shape() != Dims{width}) return false;
  if (in.bias && in.bias.shape() != Dims{width}) return false;
  if (in.residual && (in.residual.shape() != args.x.shape() || !in_quads(in.residual, DType::f32)))
    return false;
  if (in.z && (in.z.shape() != args.x.shape() || !in_quads(in.z, args.weight.dtype()))) return false;
  return in_quads(args.x, args.weight.dtype()) && vector_of_f32(in.weight) && vector_of_f32(in.bias);
}

bool conv_fits(const ProjectionArgs& args, const ProjectionResult& result) {
  const ProjectionConv& conv = args.conv;
  if (!conv.conv_state) return true;
  const std::int64_t channels = conv.weight.size(0);
  const std::int64_t rows = args.x.size(0);
  const Tensor& state = conv.conv_state;
  const Tensor& at = conv.conv_state_indices;
  if (args.input.z || result.out.dtype() != args.weight.dtype()) return false;
  if (at ? at.shape() != Dims{rows} || (at.dtype() != DType::i64 && at.dtype() != DType::i32)
         : state.size(0) != rows)
    return false;
  return conv.weight.size(1) == 4 && vector_of_f32(conv.weight) &&
         (!conv.bias || (vector_of_f32(conv.bias) && conv.bias.shape() == Dims{channels})) &&
         state.dtype() == DType::f32 && state.ndim() == 3 && state.size(1) == channels && state.size(2) == 3;
}

template <typename T>
void run(Context& ctx, const ProjectionArgs& args, const ProjectionResult& result, const FewRowsPlan& plan) {
  const ProjectionInput& in = args.input;
  const FewRowsWeights p{.data = args.weight.raw(),
                         .stride = args.weight.stride(0),
                         .in = static_cast<int>(args.weight.size(1)),
                         .out = static_cast<int>(args.weight.size(0)),
                         .rows = static_cast<int>(args.x.size(0))};
  const linear_detail::PlainOutput plain{.bias = cuda::AnyView<1>(args.bias),
                                         .out = cuda::AnyView<2>(result.out)};
  const auto launch = [&](const auto& input) {
    constexpr bool kGated = std::is_same_v<std::remove_cvref_t<decltype(input)>, NormedInput<T, true>>;
    if constexpr (!kGated) {
      if (const ProjectionConv& conv = args.conv; conv.conv_state) {
        ConvOutput<T> output{.plain = plain,
                             .first = static_cast<int>(conv.first),
                             .channels = static_cast<int>(conv.weight.size(0)),
                             .weight = conv.weight.data<float>(),
                             .bias = conv.bias ? conv.bias.data<float>() : nullptr,
                             .state = conv.conv_state.data<float>(),
                             .state_rows = conv.conv_state.size(0),
                             .indices = cuda::IndexView(conv.conv_state_indices),
                             .convolved = static_cast<T*>(result.convolved.raw()),
                             .silu = conv.activation == Activation::silu};
        for (int i = 0; i < 3; ++i) output.stride[i] = conv.conv_state.stride(i);
        linear_detail::launch_few_rows<T, /*kMayBeWide=*/false>(ctx, "projection with conv", plan, p, input,
                                                                output);
        return;
      }
    }
    linear_detail::launch_few_rows<T, /*kMayBeWide=*/false>(ctx, "projection", plan, p, input, plain);
  };
  const auto fill = [&](auto input) {
    input.x = static_cast<const T*>(args.x.raw());
    input.x_stride = args.x.stride(0);
    if (in.weight) input.weight = in.weight.data<float>();
    if (in.bias) input.bias = in.bias.data<float>();
    input.eps = static_cast<float>(in.eps);
    input.layer = in.norm == ProjectionNorm::layer;
    input.norm_before_gate = in.norm_before_gate;
    if (in.residual) {
      input.residual = in.residual.data<float>();
      input.residual_stride = in.residual.stride(0);
    }
    if (in.z) {
      input.z = static_cast<const T*>(in.z.raw());
      input.z_stride = in.z.stride(0);
    }
    if (result.residual) input.residual_out = result.residual.data<float>();
    launch(input);
  };
  if (in.z)
    fill(NormedInput<T, true>{});
  else
    fill(NormedInput<T, false>{});
}

}  // namespace

bool fused(Context& ctx, const ProjectionArgs& args, const ProjectionResult& result) {
  const cuda::DeviceLimits& limits = cuda::limits_of(ctx);
  if (!linear_detail::few_rows_fit(ctx, args.weight)) return false;
  for (const Tensor* t : {&args.x, &args.weight, &args.bias, &args.out, &args.input.weight, &args.input.bias,
                          &args.input.residual, &args.input.z, &args.conv.conv_state, &args.conv.weight,
                          &args.conv.bias, &args.conv.conv_state_indices})
    if (*t && t->device() != ctx.device()) return false;  // the operators will say which
  if (!norm_fits(args) || !conv_fits(args, result)) return false;
  if (args.bias && args.bias.shape() != Dims{args.weight.size(0)}) return false;
  if (result.out.shape() != Dims{args.x.size(0), args.weight.size(0)}) return false;
  for (const Tensor* t : {&args.bias, &result.out})
    if (*t && t->dtype() != DType::f32 && t->dtype() != DType::bf16 && t->dtype() != DType::f16) return false;
  const FewRowsPlan plan =
      linear_detail::choose_few_rows_plan(args.x.size(0), args.weight.size(1), args.weight.size(0),
                                          limits.multiprocessors, limits.shared_memory_per_block);
  if (plan.tiles == 0) return false;
  args.weight.dtype() == DType::f16 ? run<__half>(ctx, args, result, plan)
                                    : run<__nv_bfloat16>(ctx, args, result, plan);
  return true;
}

}  // namespace krait::projection_detail
