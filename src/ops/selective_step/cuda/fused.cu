// selective_step in one kernel: a few lanes a channel, each with two of its states and its share of the
// channel's row of dt_weight, which is read, as all weights, before the kernel in front has ended.
#include "core/cuda/elements.cuh"
#include "core/cuda/overlap.cuh"
#include "core/cuda/vectors.cuh"
#include "ops/selective_step/kernels.h"

namespace krait::selective_step_detail {
namespace {

using cuda::AnyView;

constexpr int kThreads = 128;
constexpr int kMostPieces = 3;  // 16 bytes of a row of dt_weight that a lane holds

template <typename T>
struct Step {
  float* state;
  std::int64_t state_row;  // stride
  std::int64_t state_rows;
  cuda::IndexView indices;
  const T* low_dt;
  std::int64_t low_dt_row;
  const T* dt_weight;
  std::int64_t dt_weight_row;
  int rank;
  const float* dt_bias;
  const float* A;
  const float* D;
  AnyView<2> x;
  AnyView<2> B;
  AnyView<2> C;
  AnyView<2> z;
  AnyView<2> out;
  int channels;
  int blocks;  // of a sequence
};

template <typename T>
__device__ __forceinline__ void widen(const uint4& from, float (&to)[cuda::kPack]) {
  const auto* const values = reinterpret_cast<const T*>(&from);
#pragma unroll
  for (int i = 0; i < cuda::kPack; ++i) to[i] = cuda::to_float(values[i]);
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) step_channels(const Step<T> p) {
  cuda::let_next_start();
  const int b = static_cast<int>(blockIdx.x) / p.blocks;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int wanted =
      (static_cast<int>(blockIdx.x) % p.blocks * kThreads + static_cast<int>(threadIdx.x)) / kLanes;
  const bool is_channel = wanted < p.channels;
  const int channel = is_channel ? wanted : p.channels - 1;  // all lanes take part in the sums
  const std::int64_t row = p.indices ? p.indices(b) : b;
  const bool is_row = row >= 0 && row < p.state_rows;
  float2* const at =
      reinterpret_cast<float2*>(p.state + (is_row ? row : 0) * p.state_row + channel * (2 * kLanes)) + lane;
  cuda::prefetch(at);

  const int pieces = p.rank / cuda::kPack;
  uint4 weight[kMostPieces];
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i) {
    const int piece = lane + i * kLanes;
    weight[i] = piece < pieces
                    ? reinterpret_cast<const uint4*>(p.dt_weight + channel * p.dt_weight_row)[piece]
                    : uint4{0, 0, 0, 0};
  }
  const float2 A = reinterpret_cast<const float2*>(p.A)[channel * kLanes + lane];
  const float bias = p.dt_bias != nullptr ? p.dt_bias[channel] : 0.0F;
  const float skip = p.D != nullptr ? p.D[channel] : 0.0F;

  cuda::wait_for_previous();
  const float2 state = *at;
  uint4 low[kMostPieces];
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i) {
    const int piece = lane + i * kLanes;
    low[i] = piece < pieces ? reinterpret_cast<const uint4*>(p.low_dt + b * p.low_dt_row)[piece]
                            : uint4{0, 0, 0, 0};
  }
  const float x = p.x.load(b, channel);
  const float z = p.z ? p.z.load(b, channel) : 0.0F;
  float B[2];
  float C[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    B[i] = p.B.load(b, 2 * lane + i);
    C[i] = p.C.load(b, 2 * lane + i);
  }

  float dt = 0.0F;
#pragma unroll
  for (int i = 0; i < kMostPieces; ++i) {
    float w[cuda::kPack];
    float v[cuda::kPack];
    widen<T>(weight[i], w);
    widen<T>(low[i], v);
#pragma unroll
    for (int j = 0; j < cuda::kPack; ++j) dt = fmaf(w[j], v[j], dt);
  }
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) dt += __shfl_xor_sync(0xffffffffU, dt, apart);
  dt = cuda::softplus(dt + bias);

  constexpr float kLog2E = 1.4426950408889634F;
  float2 next;
  next.x = exp2f(dt * kLog2E * A.x) * state.x + dt * x * B[0];
  next.y = exp2f(dt * kLog2E * A.y) * state.y + dt * x * B[1];
  float y = next.x * C[0] + next.y * C[1];
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(0xffffffffU, y, apart);
  if (!is_channel) return;
  if (is_row) *at = next;
  if (lane != 0) return;
  if (p.D != nullptr) y += skip * x;
  if (p.z) y *= cuda::silu(z);
  p.out.store(is_row ? y : 0.0F, b, channel);
}

bool aligned(const Tensor& t, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(t.raw()) % bytes == 0;
}
bool vector_of_f32(const Tensor& t, std::int64_t size) {
  return !t || (t.dtype() == DType::f32 && t.shape() == Dims{size} && t.is_contiguous());
}
// Rows read 16 bytes at a time.
bool in_pieces(const Tensor& t) {
  return t.stride(1) == 1 && t.size(1) % cuda::kPack == 0 && aligned(t, 16) &&
         (t.size(0) == 1 || t.stride(0) % cuda::kPack == 0);
}
bool is_small_float(const Tensor& t) {
  return !t || t.dtype() == DType::f32 || t.dtype() == DType::bf16 || t.dtype() == DType::f16;
}

bool fits(const Context& ctx, const SelectiveStepArgs& a, const Tensor& out) {
  for (const Tensor* t : {&a.state, &a.x, &a.low_dt, &a.dt_weight, &a.dt_bias, &a.A, &a.B, &a.C, &a.D, &a.z,
                          &a.state_batch_indices, &out})
    if (*t && t->device() != ctx.device()) return false;
  const Tensor& state = a.state;
  const std::int64_t batch = a.x.size(0);
  const std::int64_t channels = a.x.size(1);
  if (batch < 1 || batch > 64 || !state || state.ndim() != 3 || state.dtype() != DType::f32) return false;
  const std::int64_t N = state.size(2);
  if ((N != 8 && N != 16 && N != 32 && N != 64) || state.size(1) != channels) return false;
  if (state.stride(2) != 1 || state.stride(1) != N || state.stride(0) % 2 != 0 || !aligned(state, 8))
    return false;
  const DType dtype = a.dt_weight.dtype();
  if ((dtype != DType::f16 && dtype != DType::bf16) || a.low_dt.dtype() != dtype) return false;
  if (!in_pieces(a.dt_weight) || !in_pieces(a.low_dt)) return false;
  if (a.low_dt.size(1) > kMostPieces * cuda::kPack * (N / 2)) return false;
  if (!a.A || a.A.shape() != Dims{channels, N} || a.A.dtype() != DType::f32 || !a.A.is_contiguous() ||
      !aligned(a.A, 8))
    return false;
  if (!vector_of_f32(a.D, channels) || !vector_of_f32(a.dt_bias, channels)) return false;
  for (const Tensor* t : {&a.B, &a.C})
    if (!*t || t->shape() != Dims{batch, N} || !is_small_float(*t)) return false;
  if (a.z && a.z.shape() != a.x.shape()) return false;
  if (!is_small_float(a.x) || !is_small_float(a.z) || out.dtype() != a.x.dtype() ||
      out.shape() != a.x.shape())
    return false;
  const Tensor& rows = a.state_batch_indices;
  return rows ? rows.shape() == Dims{batch} && (rows.dtype() == DType::i64 || rows.dtype() == DType::i32)
              : state.size(0) == batch;
}

template <typename T>
void run(Context& ctx, const SelectiveStepArgs& a, const Tensor& out) {
  const int lanes = static_cast<int>(a.state.size(2)) / 2;
  Step<T> p{.state = a.state.data<float>(),
            .state_row = a.state.stride(0),
            .state_rows = a.state.size(0),
            .indices = cuda::IndexView(a.state_batch_indices),
            .low_dt = static_cast<const T*>(a.low_dt.raw()),
            .low_dt_row = a.low_dt.stride(0),
            .dt_weight = static_cast<const T*>(a.dt_weight.raw()),
            .dt_weight_row = a.dt_weight.stride(0),
            .rank = static_cast<int>(a.low_dt.size(1)),
            .dt_bias = a.dt_bias ? a.dt_bias.data<float>() : nullptr,
            .A = a.A.data<float>(),
            .D = a.D ? a.D.data<float>() : nullptr,
            .x = AnyView<2>(a.x),
            .B = AnyView<2>(a.B),
            .C = AnyView<2>(a.C),
            .z = AnyView<2>(a.z),
            .out = AnyView<2>(out),
            .channels = static_cast<int>(a.x.size(1)),
            .blocks = static_cast<int>((a.x.size(1) * lanes + kThreads - 1) / kThreads)};
  const auto blocks = static_cast<unsigned>(p.blocks * a.x.size(0));
  const auto launch = [&](const auto kernel) {
    cuda::launch_overlapping(ctx, "selective_step", kernel, dim3(blocks), dim3(kThreads), 0, p);
  };
  switch (lanes) {
    case 4: return launch(step_channels<T, 4>);
    case 8: return launch(step_channels<T, 8>);
    case 16: return launch(step_channels<T, 16>);
    default: return launch(step_channels<T, 32>);
  }
}

}  // namespace

bool fused(Context& ctx, const SelectiveStepArgs& args, const Tensor& out) {
  if (!fits(ctx, args, out)) return false;
  args.dt_weight.dtype() == DType::f16 ? run<__half>(ctx, args, out) : run<__nv_bfloat16>(ctx, args, out);
  return true;
}

}  // namespace krait::selective_step_detail
