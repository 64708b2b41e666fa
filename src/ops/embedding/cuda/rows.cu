// embedding on a GPU: a block a token. An id outside the table gives zeros.
#include "core/cuda/elements.cuh"
#include "ops/embedding/kernels.h"

namespace krait::embedding_detail {
namespace {

using cuda::AnyView;
using cuda::IndexView;

__global__ void gather(IndexView ids, std::int64_t count, std::int64_t vocabulary, std::int64_t d,
                       AnyView<2> weight, AnyView<2> out) {
  for (std::int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const std::int64_t id = ids(i);
    const bool known = id >= 0 && id < vocabulary;
    for (std::int64_t c = threadIdx.x; c < d; c += blockDim.x)
      out.store(known ? weight.load(id, c) : 0.0F, i, c);
  }
}

// Rows of one dtype without gaps, 16 bytes at a time.
__global__ void gather_vectors(IndexView ids, std::int64_t count, std::int64_t vocabulary,
                               std::int64_t vectors, const uint4* __restrict__ weight,
                               std::int64_t weight_stride, uint4* __restrict__ out) {
  for (std::int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const std::int64_t id = ids(i);
    const bool known = id >= 0 && id < vocabulary;
    for (std::int64_t c = threadIdx.x; c < vectors; c += blockDim.x)
      out[i * vectors + c] = known ? weight[id * weight_stride + c] : uint4{0, 0, 0, 0};
  }
}

bool in_vectors(const Tensor& t) {
  const auto per_vector = static_cast<std::int64_t>(16 / size_of(t.dtype()));
  return t.stride(1) == 1 && t.size(1) % per_vector == 0 && t.stride(0) % per_vector == 0 &&
         reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0;
}

}  // namespace

void gather_cuda(Context& ctx, const Tensor& weight, const Tensor& ids, const Tensor& out) {
  const std::int64_t count = out.size(0);
  const std::int64_t vocabulary = weight.size(0);
  const std::int64_t d = weight.size(1);
  const unsigned grid = cuda::blocks_for(ctx, count, 1, 32);
  if (weight.dtype() == out.dtype() && in_vectors(weight) && in_vectors(out)) {
    const auto per_vector = static_cast<std::int64_t>(16 / size_of(out.dtype()));
    cuda::launch(ctx, "embedding", gather_vectors, grid, 128, 0, IndexView(ids), count, vocabulary,
                 d / per_vector, static_cast<const uint4*>(weight.raw()), weight.stride(0) / per_vector,
                 static_cast<uint4*>(out.raw()));
  } else {
    cuda::launch(ctx, "embedding", gather, grid, 256, 0, IndexView(ids), count, vocabulary, d,
                 AnyView<2>(weight), AnyView<2>(out));
  }
}

}  // namespace krait::embedding_detail
