// From what a file says about a tensor to a Tensor: the checks that all formats share. `what` begins
// every message: the file, and the tensor where it has a name.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "krait/core/tensor.h"

namespace krait::io {

static_assert(std::endian::native == std::endian::little, "files are little-endian and used in place");

// Bytes of a file and what keeps them alive.
struct Bytes {
  std::span<const std::byte> data;
  std::shared_ptr<void> owner;
};

// The little-endian number at `at`, which the caller has found to be inside.
template <typename T>
[[nodiscard]] T load(std::span<const std::byte> bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

// The bytes of a number, as load reads them back.
template <typename T>
[[nodiscard]] std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

[[nodiscard]] inline std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Sizes or strides; throws where there are more than Dims holds.
[[nodiscard]] Dims checked_dims(std::span<const std::int64_t> values, const std::string& what);

// Bytes of a contiguous tensor. Throws where a size is negative, and where the sizes (an empty
// dimension counted as 1) multiply to more bytes than 63 bits count, so that nothing that is computed
// from shape and strides later can overflow.
[[nodiscard]] std::size_t checked_nbytes(const Dims& shape, DType dtype, const std::string& what);

// The bytes themselves where elements of `dtype` may be read in place, else a copy of them.
// Throws where a boolean is neither 0 nor 1 (C++ gives such a bool no meaning).
[[nodiscard]] Bytes usable_as(Bytes bytes, DType dtype, const std::string& what);

// A view of `bytes`, whose size has been checked.
[[nodiscard]] Tensor view_of(const Bytes& bytes, const Dims& shape, const Dims& strides, DType dtype);

// Throws where a tensor that is to be written is absent or not on the CPU.
void require_writable(const Tensor& tensor, const std::string& what);

// The elements of a contiguous tensor.
[[nodiscard]] inline std::span<const std::byte> bytes_of(const Tensor& contiguous) {
  return {static_cast<const std::byte*>(contiguous.raw()), contiguous.nbytes()};
}

}  // namespace krait::io
