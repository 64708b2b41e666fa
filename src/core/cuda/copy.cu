#include "core/cuda/copy.h"

#include <algorithm>
#include <cstddef>

#include "core/cuda/elements.cuh"

namespace krait::cuda {
namespace {

constexpr int kThreads = 256;

// A tensor with its dimensions merged where they continue each other in both operands.
struct Layout {
  int rank = 0;
  std::int64_t size[Dims::max_ndim] = {};
  std::int64_t to[Dims::max_ndim] = {};
  std::int64_t from[Dims::max_ndim] = {};
};

Layout merged(const Tensor& to, const Tensor& from) {
  Layout layout;
  for (int i = 0; i < to.ndim(); ++i) {
    if (to.size(i) == 1) continue;
    const int last = layout.rank - 1;
    if (layout.rank > 0 && layout.to[last] == to.stride(i) * to.size(i) &&
        layout.from[last] == from.stride(i) * to.size(i)) {
      layout.size[last] *= to.size(i);
      layout.to[last] = to.stride(i);
      layout.from[last] = from.stride(i);
      continue;
    }
    layout.size[layout.rank] = to.size(i);
    layout.to[layout.rank] = to.stride(i);
    layout.from[layout.rank++] = from.stride(i);
  }
  return layout;
}

__device__ __forceinline__ void place(const Layout& layout, std::int64_t i, std::int64_t& to,
                                      std::int64_t& from) {
  to = from = 0;
  for (int d = layout.rank - 1; d >= 0; --d) {
    const std::int64_t at = i % layout.size[d];
    i /= layout.size[d];
    to += at * layout.to[d];
    from += at * layout.from[d];
  }
}

// Bits of one size, whatever their type.
template <typename T>
__global__ void copy_bits(Layout layout, std::int64_t count, const T* from, T* to) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    place(layout, i, a, b);
    to[a] = from[b];
  }
}

// Between f32, bf16 and f16.
__global__ void convert_floats(Layout layout, std::int64_t count, const void* from, DType from_dtype,
                               void* to, DType to_dtype) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    place(layout, i, a, b);
    store_float(to, to_dtype, a, load_float(from, from_dtype, b));
  }
}

// Rows of 8 elements at a time between contiguous f32 and 16-bit floats: the cast of weights and activations.
template <typename From, typename To>
__global__ void convert_packed(std::int64_t vectors, const From* __restrict__ from, To* __restrict__ to) {
  struct alignas(sizeof(From) * 8 > 16 ? 16 : sizeof(From) * 8) Source {
    From v[8];
  };
  struct alignas(sizeof(To) * 8 > 16 ? 16 : sizeof(To) * 8) Target {
    To v[8];
  };
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < vectors;
       i += std::int64_t{gridDim.x} * kThreads) {
    const Source s = reinterpret_cast<const Source*>(from)[i];
    Target t;
#pragma unroll
    for (int j = 0; j < 8; ++j) t.v[j] = from_float<To>(to_float(s.v[j]));
    reinterpret_cast<Target*>(to)[i] = t;
  }
}

// Between integers, booleans and f64, through a type that holds both.
template <typename From, typename To>
__global__ void convert_numbers(Layout layout, std::int64_t count, const From* from, To* to) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    place(layout, i, a, b);
    to[a] = static_cast<To>(from[b]);
  }
}

template <typename T>
__global__ void fill_kernel(Layout layout, std::int64_t count, T value, T* to) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    std::int64_t a = 0;
    std::int64_t b = 0;
    place(layout, i, a, b);
    to[a] = value;
  }
}

unsigned grid_of(std::int64_t count) {
  return static_cast<unsigned>(std::min<std::int64_t>((count + kThreads - 1) / kThreads, 132 * 16));
}

struct alignas(16) Bits16 {
  std::uint64_t half[2];
};

template <typename F>
void by_size(std::size_t bytes, F&& f) {
  switch (bytes) {
    case 1: return f(std::uint8_t{});
    case 2: return f(std::uint16_t{});
    case 4: return f(std::uint32_t{});
    case 8: return f(std::uint64_t{});
    default: return f(Bits16{});
  }
}

bool small_float(DType d) { return d == DType::f32 || d == DType::bf16 || d == DType::f16; }
bool aligned(const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0; }

void convert_on_device(cudaStream_t stream, const Tensor& from, const Tensor& to) {
  const std::int64_t count = to.numel();
  const Layout layout = merged(to, from);
  if (from.dtype() == to.dtype()) {
    by_size(size_of(to.dtype()), [&](auto bits) {
      using T = decltype(bits);
      copy_bits<T><<<grid_of(count), kThreads, 0, stream>>>(layout, count, static_cast<const T*>(from.raw()),
                                                            static_cast<T*>(to.raw()));
    });
    check(cudaGetLastError(), "copy");
    return;
  }
  if (small_float(from.dtype()) && small_float(to.dtype())) {
    const bool flat = layout.rank == 0 || (layout.rank == 1 && layout.to[0] == 1 && layout.from[0] == 1);
    if (flat && count % 8 == 0 && aligned(from) && aligned(to)) {
      dispatch_element(from.dtype(), "copy", [&](auto from_tag) {
        dispatch_element(to.dtype(), "copy", [&](auto to_tag) {
          using From = decltype(from_tag);
          using To = decltype(to_tag);
          convert_packed<From, To><<<grid_of(count / 8), kThreads, 0, stream>>>(
              count / 8, static_cast<const From*>(from.raw()), static_cast<To*>(to.raw()));
        });
      });
    } else {
      convert_floats<<<grid_of(count), kThreads, 0, stream>>>(layout, count, from.raw(), from.dtype(),
                                                              to.raw(), to.dtype());
    }
    check(cudaGetLastError(), "copy");
    return;
  }
  if (from.dtype() == DType::i32 && to.dtype() == DType::i64) {
    convert_numbers<<<grid_of(count), kThreads, 0, stream>>>(
        layout, count, static_cast<const std::int32_t*>(from.raw()), static_cast<std::int64_t*>(to.raw()));
  } else if (from.dtype() == DType::i64 && to.dtype() == DType::i32) {
    convert_numbers<<<grid_of(count), kThreads, 0, stream>>>(
        layout, count, static_cast<const std::int64_t*>(from.raw()), static_cast<std::int32_t*>(to.raw()));
  } else {
    fail(ErrorKind::invalid_argument, "copy on a GPU from dtype ", name_of(from.dtype()), " to ",
         name_of(to.dtype()), " is not supported; convert on the CPU");
  }
  check(cudaGetLastError(), "copy");
}

// Memory of the stream's device for the time of one copy.
class Scratch {
 public:
  Scratch(cudaStream_t stream, std::size_t bytes) : stream_(stream) {
    check(cudaMallocAsync(&data_, bytes, stream), "copy");
  }
  ~Scratch() { (void)cudaFreeAsync(data_, stream_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  [[nodiscard]] void* data() const { return data_; }

 private:
  cudaStream_t stream_;
  void* data_ = nullptr;
};

}  // namespace

void copy_elements(cudaStream_t stream, const Tensor& from, const Tensor& to) {
  require(from.shape() == to.shape(), "copy: shape ", from.shape(), ", expected ", to.shape());
  if (to.numel() == 0) return;
  const bool from_host = from.device().kind == Device::Kind::cpu;
  const bool to_host = to.device().kind == Device::Kind::cpu;
  if (from.dtype() == to.dtype() && from.is_contiguous() && to.is_contiguous()) {
    // Pageable memory of the host is staged before the call returns only where it is small. What is a few
    // times larger goes in such pieces, so that the host need not wait until the device has come this far.
    constexpr std::size_t kStaged = 64 * 1024;
    constexpr std::size_t kMostPieces = 16;
    const std::size_t bytes = to.nbytes();
    const bool in_pieces = from_host && bytes <= kMostPieces * kStaged;
    const std::size_t piece = in_pieces ? std::min(bytes, kStaged) : bytes;
    for (std::size_t at = 0; at < bytes; at += piece)
      check(cudaMemcpyAsync(static_cast<std::byte*>(to.raw()) + at,
                            static_cast<const std::byte*>(from.raw()) + at, std::min(piece, bytes - at),
                            cudaMemcpyDefault, stream),
            "copy");
    if (to_host || (from_host && !in_pieces)) check(cudaStreamSynchronize(stream), "copy");
    return;
  }
  if (!from_host && !to_host) return convert_on_device(stream, from, to);
  if (from_host) {
    // The host makes the dtype and the order, the device the strides.
    const Tensor packed = from.to(to.dtype()).contiguous();
    if (to.is_contiguous()) {
      check(cudaMemcpyAsync(to.raw(), packed.raw(), packed.nbytes(), cudaMemcpyHostToDevice, stream), "copy");
      check(cudaStreamSynchronize(stream), "copy");
      return;
    }
    const Scratch scratch(stream, packed.nbytes());
    check(cudaMemcpyAsync(scratch.data(), packed.raw(), packed.nbytes(), cudaMemcpyHostToDevice, stream),
          "copy");
    convert_on_device(stream, Tensor::wrap(scratch.data(), to.shape(), to.dtype(), {}, to.device()), to);
    check(cudaStreamSynchronize(stream), "copy");
    return;
  }
  // To the host: the device makes it contiguous, the host the rest.
  const Tensor landed =
      to.is_contiguous() && to.dtype() == from.dtype() ? to : Tensor::empty(from.shape(), from.dtype());
  if (from.is_contiguous()) {
    check(cudaMemcpyAsync(landed.raw(), from.raw(), landed.nbytes(), cudaMemcpyDeviceToHost, stream), "copy");
    check(cudaStreamSynchronize(stream), "copy");
  } else {
    const Scratch scratch(stream, from.nbytes());
    convert_on_device(stream, from,
                      Tensor::wrap(scratch.data(), from.shape(), from.dtype(), {}, from.device()));
    check(cudaMemcpyAsync(landed.raw(), scratch.data(), landed.nbytes(), cudaMemcpyDeviceToHost, stream),
          "copy");
    check(cudaStreamSynchronize(stream), "copy");
  }
  if (landed.raw() != to.raw()) to.copy_from(landed);
}

void fill_elements(cudaStream_t stream, const Tensor& t, double value) {
  if (t.numel() == 0) return;
  if (value == 0.0 && t.is_contiguous()) {
    check(cudaMemsetAsync(t.raw(), 0, t.nbytes(), stream), "fill");
    return;
  }
  const Tensor one = Tensor::zeros({1}, t.dtype());  // the element, as the host makes it
  one.fill(value);
  by_size(size_of(t.dtype()), [&](auto bits) {
    using T = decltype(bits);
    fill_kernel<T><<<grid_of(t.numel()), kThreads, 0, stream>>>(
        merged(t, t), t.numel(), *static_cast<const T*>(one.raw()), static_cast<T*>(t.raw()));
  });
  check(cudaGetLastError(), "fill");
}

}  // namespace krait::cuda
