#include <algorithm>

#include "core/cuda/elements.cuh"
#include "ops/dropout/bits.h"

namespace krait::dropout_detail {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = static_cast<int>(kElementsPerBlock);

// krait::philox4x32.
__device__ uint4 philox(std::uint64_t place, std::uint64_t stream, std::uint64_t seed) {
  constexpr std::uint32_t kMul0 = 0xD2511F53U;
  constexpr std::uint32_t kMul1 = 0xCD9E8D57U;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9U;
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85U;
  uint4 c = make_uint4(static_cast<std::uint32_t>(place), static_cast<std::uint32_t>(place >> 32),
                       static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32));
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    c = make_uint4(__umulhi(kMul1, c.z) ^ c.y ^ key0, kMul1 * c.z, __umulhi(kMul0, c.x) ^ c.w ^ key1,
                   kMul0 * c.x);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

// A thread has one block of the generator and the eight elements, or fewer at the ends, that its bits are
// for.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    drop(const Rule rule, std::int64_t count, bool aligned, const T* x, T* out) {
  struct alignas(16) Eight {
    T v[kBlock];
  };
  const std::uint64_t skip = rule.offset % kBlock;  // elements of the first block before the first of x
  const std::int64_t blocks = (count + static_cast<std::int64_t>(skip) + kBlock - 1) / kBlock;
  const auto scale = static_cast<float>(rule.scale);
  for (std::int64_t b = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; b < blocks;
       b += std::int64_t{gridDim.x} * kThreads) {
    const uint4 bits = philox(rule.offset / kBlock + static_cast<std::uint64_t>(b), rule.stream, rule.seed);
    const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
    const std::int64_t first = b * kBlock - static_cast<std::int64_t>(skip);
    const auto value = [&](int i, float from) {
      const std::uint32_t own = i % 2 == 0 ? words[i / 2] & 0xffffU : words[i / 2] >> 16;
      // A product with 0 would keep NaN and infinity alive, and a sign.
      return cuda::from_float<T>(own >= rule.dropped ? from * scale : 0.0F);
    };
    if (aligned && first + kBlock <= count) {
      Eight eight = *reinterpret_cast<const Eight*>(x + first);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) eight.v[i] = value(i, cuda::to_float(eight.v[i]));
      *reinterpret_cast<Eight*>(out + first) = eight;
    } else {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const std::int64_t at = first + i;
        if (at >= 0 && at < count) out[at] = value(i, cuda::to_float(x[at]));
      }
    }
  }
}

}  // namespace

void cuda(Context& ctx, const Rule& rule, const Tensor& x, const Tensor& out) {
  const std::int64_t count = x.numel();
  if (count == 0) return;
  const auto on_boundary = [](const Tensor& t) {
    return reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0;
  };
  const bool aligned = rule.offset % kBlock == 0 && on_boundary(x) && on_boundary(out);
  cuda::dispatch_element(x.dtype(), "[dropout] x", [&](auto t) {
    using T = decltype(t);
    cuda::launch(ctx, "dropout", drop<T>, dim3(cuda::blocks_for(ctx, count / kBlock + 2, kThreads)),
                 dim3(kThreads), 0, rule, count, aligned, static_cast<const T*>(x.raw()),
                 static_cast<T*>(out.raw()));
  });
}

}  // namespace krait::dropout_detail
