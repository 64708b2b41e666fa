// NumPy's .npy, versions 1, 2 and 3 (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html):
// one array in a file.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "krait/core/tensor.h"

namespace krait::io {

// dtypes: f2, f4, f8, i1, i2, i4, i8, u1, b1, c8, c16, and V2 (two raw bytes) for bf16, which NumPy
// does not know; u2, u4 and u8 become i64. A Fortran-ordered array becomes a tensor with the strides of one.
// The tensor points into the mapped file where its elements are aligned, and is then read-only. Throws
// Error(invalid_argument) for big-endian and structured arrays, headers that are no such header, and files
// that are shorter or longer than the header says.
[[nodiscard]] Tensor read_npy(const std::filesystem::path& path);

// The same of a file in memory, which `owner` keeps alive. `name` stands in messages.
[[nodiscard]] Tensor parse_npy(std::span<const std::byte> bytes, std::shared_ptr<void> owner,
                               const std::string& name);

// Writes a tensor (on the CPU, any strides) in row-major order. The write is atomic (AtomicFile).
void write_npy(const std::filesystem::path& path, const Tensor& tensor);

}  // namespace krait::io
