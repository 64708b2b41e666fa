#include "io/layout.h"

#include <algorithm>
#include <limits>

#include "krait/core/error.h"

namespace krait::io {

Dims checked_dims(std::span<const std::int64_t> values, const std::string& what) {
  require(values.size() <= Dims::max_ndim, what, " has ", values.size(), " dimensions, expected at most ",
          int{Dims::max_ndim});
  return Dims(values);
}

std::size_t checked_nbytes(const Dims& shape, DType dtype, const std::string& what) {
  auto bytes = static_cast<std::int64_t>(size_of(dtype));
  bool empty = false;
  for (const std::int64_t size : shape) {
    require(size >= 0, what, " has shape ", shape, ", expected no negative size");
    empty = empty || size == 0;
    require(!__builtin_mul_overflow(bytes, std::max<std::int64_t>(size, 1), &bytes), what, " has shape ",
            shape, ", expected fewer than 2^63 bytes");
  }
  return empty ? 0 : static_cast<std::size_t>(bytes);
}

Bytes usable_as(Bytes bytes, DType dtype, const std::string& what) {
  if (dtype == DType::boolean) {
    const auto odd =
        std::find_if(bytes.data.begin(), bytes.data.end(), [](std::byte b) { return b > std::byte{1}; });
    require(odd == bytes.data.end(), what, " has boolean ", odd - bytes.data.begin(), " stored as ",
            odd == bytes.data.end() ? 0 : std::to_integer<int>(*odd), ", expected 0 or 1");
  }
  const std::size_t alignment = std::min<std::size_t>(size_of(dtype), 8);
  if (reinterpret_cast<std::uintptr_t>(bytes.data.data()) % alignment == 0) return bytes;
  const Tensor copy = Tensor::empty(Dims{static_cast<std::int64_t>(bytes.data.size())}, DType::u8);
  std::memcpy(copy.raw(), bytes.data.data(), bytes.data.size());
  return {.data = bytes_of(copy), .owner = copy.owner()};
}

Tensor view_of(const Bytes& bytes, const Dims& shape, const Dims& strides, DType dtype) {
  // Tensor has no read-only form; the headers say that these are.
  auto* data = const_cast<std::byte*>(bytes.data.data());
  return Tensor::wrap(data, shape, strides, dtype, bytes.owner);
}

void require_writable(const Tensor& tensor, const std::string& what) {
  require(tensor.defined(), what, " is absent, expected a tensor");
  require(tensor.device() == Device{}, what, " is on ", name_of(tensor.device()), ", expected cpu");
}

}  // namespace krait::io
