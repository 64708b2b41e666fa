#include <algorithm>
#include <array>
#include <initializer_list>

#include "core/cuda/vectors.cuh"
#include "ops/activation/kernels.h"

namespace krait::activation {
namespace {

using cuda::kPack;
using cuda::Pack;

constexpr int kThreads = 256;

// What an operator does with one element of each operand.
struct GatedSilu {
  static constexpr int kIn = 2;
  static constexpr int kOut = 1;
  __device__ void operator()(const float (&in)[kIn], float (&out)[kOut]) const {
    out[0] = in[0] * cuda::quick_silu(in[1]);
  }
};

struct GatedSiluBackward {
  static constexpr int kIn = 3;
  static constexpr int kOut = 2;
  __device__ void operator()(const float (&in)[kIn], float (&out)[kOut]) const {
    const float s = cuda::quick_sigmoid(in[1]);
    out[0] = in[2] * in[1] * s;
    out[1] = in[2] * in[0] * cuda::silu_slope(in[1], s);
  }
};

constexpr float kTanhScale = 0.797884560802865F;  // sqrt(2 / pi)
constexpr float kCubic = 0.044715F;
constexpr float kInverseSqrt2 = 0.707106781186548F;
constexpr float kDensity = 0.398942280401433F;  // of the standard normal distribution at 0

template <GeluKind kKind>
struct Gelu {
  static constexpr int kIn = 1;
  static constexpr int kOut = 1;
  __device__ void operator()(const float (&in)[kIn], float (&out)[kOut]) const {
    const float x = in[0];
    if constexpr (kKind == GeluKind::exact)
      out[0] = 0.5F * x * (1.0F + erff(x * kInverseSqrt2));
    else  // 0.5 (1 + tanh(y)) = sigmoid(2 y)
      out[0] = x * cuda::quick_sigmoid(2.0F * kTanhScale * x * fmaf(kCubic, x * x, 1.0F));
  }
};

template <GeluKind kKind>
struct GeluBackward {
  static constexpr int kIn = 2;
  static constexpr int kOut = 1;
  __device__ void operator()(const float (&in)[kIn], float (&out)[kOut]) const {
    const float x = in[0];
    if constexpr (kKind == GeluKind::exact) {
      out[0] = in[1] * (0.5F * (1.0F + erff(x * kInverseSqrt2)) + x * kDensity * __expf(-0.5F * x * x));
    } else {
      // Beyond 12 the slope is 0 or 1; the cube of much larger values would overflow.
      const float v = x > 12.0F ? 12.0F : x < -12.0F ? -12.0F : x;
      const float s = cuda::quick_sigmoid(2.0F * kTanhScale * v * fmaf(kCubic, v * v, 1.0F));
      const float inner = 2.0F * kTanhScale * fmaf(3.0F * kCubic, v * v, 1.0F);
      out[0] = in[1] * fmaf(v * s * (1.0F - s), inner, s);
    }
  }
};

// Operands of one shape, inputs before outputs, with dimensions merged where they continue each other in all.
// Absent ones have no data.
template <int kCount>
struct Operands {
  std::int64_t count = 0;
  int rank = 0;
  std::int64_t size[Dims::max_ndim] = {};
  void* data[kCount] = {};
  DType dtype[kCount] = {};
  std::int64_t stride[kCount][Dims::max_ndim] = {};

  explicit Operands(const std::array<Tensor, kCount>& tensors) : count(tensors[0].numel()) {
    const Dims& shape = tensors[0].shape();
    for (int t = 0; t < kCount; ++t) {
      if (!tensors[t]) continue;
      data[t] = tensors[t].raw();
      dtype[t] = tensors[t].dtype();
    }
    for (int d = 0; d < shape.size(); ++d) {
      if (shape[d] == 1) continue;
      bool continues = rank > 0;
      for (int t = 0; t < kCount; ++t)
        continues = continues && (!tensors[t] || stride[t][rank - 1] == tensors[t].stride(d) * shape[d]);
      if (!continues) ++rank;
      size[rank - 1] = (continues ? size[rank - 1] : 1) * shape[d];
      for (int t = 0; t < kCount; ++t) stride[t][rank - 1] = tensors[t] ? tensors[t].stride(d) : 0;
    }
  }

  // Elements side by side in whole vectors, in one row or in rows of one stride for each operand.
  [[nodiscard]] bool in_vectors() const {
    if (rank < 1 || rank > 2 || size[rank - 1] % kPack != 0 || count / kPack > (std::int64_t{1} << 31))
      return false;
    for (int t = 0; t < kCount; ++t) {
      if (data[t] == nullptr) continue;
      if (dtype[t] != dtype[0] || stride[t][rank - 1] != 1) return false;
      if (reinterpret_cast<std::uintptr_t>(data[t]) % 16 != 0) return false;
      if (rank == 2 && stride[t][0] % kPack != 0) return false;
    }
    return true;
  }
};

// Any strides, any mixture of dtypes.
template <typename F>
__global__ void __launch_bounds__(kThreads) each_element(const Operands<F::kIn + F::kOut> p, const F f) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.count; i += step) {
    std::int64_t offset[F::kIn + F::kOut] = {};
    std::int64_t rest = i;
    for (int d = p.rank - 1; d >= 0; --d) {
      const std::int64_t at = rest % p.size[d];
      rest /= p.size[d];
#pragma unroll
      for (int t = 0; t < F::kIn + F::kOut; ++t) offset[t] += at * p.stride[t][d];
    }
    float in[F::kIn];
    float out[F::kOut];
#pragma unroll
    for (int t = 0; t < F::kIn; ++t) in[t] = cuda::load_float(p.data[t], p.dtype[t], offset[t]);
    f(in, out);
#pragma unroll
    for (int t = 0; t < F::kOut; ++t)
      if (p.data[F::kIn + t] != nullptr)
        cuda::store_float(p.data[F::kIn + t], p.dtype[F::kIn + t], offset[F::kIn + t], out[t]);
  }
}

// Rows of vectors of T.
template <typename T, int kCount>
struct Vectors {
  unsigned count;    // of all rows
  unsigned per_row;  // 0: there is one row
  T* data[kCount];
  std::int64_t stride[kCount];  // of rows

  explicit Vectors(const Operands<kCount>& p)
      : count(static_cast<unsigned>(p.count / kPack)),
        per_row(p.rank == 2 ? static_cast<unsigned>(p.size[1] / kPack) : 0) {
    for (int t = 0; t < kCount; ++t) {
      data[t] = static_cast<T*>(p.data[t]);
      stride[t] = p.stride[t][0];
    }
  }
};

// A thread has all of its inputs before it writes: an output may be an input.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads) each_vector(const Vectors<T, F::kIn + F::kOut> p, const F f) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.count) return;
  const unsigned row = p.per_row == 0 ? 0 : static_cast<unsigned>(i) / p.per_row;
  const std::int64_t place = (i - std::int64_t{row} * p.per_row) * kPack;
  Pack<T> in[F::kIn];
#pragma unroll
  for (int t = 0; t < F::kIn; ++t) in[t] = cuda::load_pack(p.data[t] + row * p.stride[t] + place);
  float out[F::kOut][kPack];
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    float from[F::kIn];
    float to[F::kOut];
#pragma unroll
    for (int t = 0; t < F::kIn; ++t) from[t] = cuda::to_float(in[t].v[j]);
    f(from, to);
#pragma unroll
    for (int t = 0; t < F::kOut; ++t) out[t][j] = to[t];
  }
#pragma unroll
  for (int t = 0; t < F::kOut; ++t)
    if (p.data[F::kIn + t] != nullptr)
      cuda::store_pack(p.data[F::kIn + t] + row * p.stride[F::kIn + t] + place, out[t]);
}

template <typename F>
void run(Context& ctx, const char* op, const F& f, const std::array<Tensor, F::kIn + F::kOut>& tensors) {
  const Operands<F::kIn + F::kOut> operands(tensors);
  if (operands.count == 0) return;
  if (!operands.in_vectors()) {
    const unsigned blocks = cuda::blocks_for(ctx, operands.count, kThreads);
    cuda::launch(ctx, op, each_element<F>, dim3(blocks), dim3(kThreads), 0, operands, f);
    return;
  }
  cuda::dispatch_element(operands.dtype[0], op, [&](auto t) {
    using T = decltype(t);
    const Vectors<T, F::kIn + F::kOut> vectors(operands);
    const auto blocks = static_cast<unsigned>((std::int64_t{vectors.count} + kThreads - 1) / kThreads);
    cuda::launch(ctx, op, each_vector<T, F>, dim3(blocks), dim3(kThreads), 0, vectors, f);
  });
}

}  // namespace

void cuda_gated_silu(Context& ctx, const Tensor& x, const Tensor& gate, const Tensor& out) {
  run(ctx, "gated_silu", GatedSilu{}, {x, gate, out});
}

void cuda_gated_silu_backward(Context& ctx, const GatedSiluBackwardArgs& a) {
  run(ctx, "gated_silu_backward", GatedSiluBackward{}, {a.x, a.gate, a.dout, a.dx, a.dgate});
}

void cuda_gelu(Context& ctx, const Tensor& x, const Tensor& out, GeluKind kind) {
  if (kind == GeluKind::exact)
    run(ctx, "gelu", Gelu<GeluKind::exact>{}, {x, out});
  else
    run(ctx, "gelu", Gelu<GeluKind::tanh>{}, {x, out});
}

void cuda_gelu_backward(Context& ctx, const GeluBackwardArgs& a) {
  if (a.kind == GeluKind::exact)
    run(ctx, "gelu_backward", GeluBackward<GeluKind::exact>{}, {a.x, a.dout, a.dx});
  else
    run(ctx, "gelu_backward", GeluBackward<GeluKind::tanh>{}, {a.x, a.dout, a.dx});
}

}  // namespace krait::activation
