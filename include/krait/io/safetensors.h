// Safetensors (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON
// header, the header (dtype, shape and byte range of each tensor), then the elements, little-endian
// and row-major, without gaps.
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "krait/io/tensor_file.h"

namespace krait::io {

// The header's "__metadata__".
using Metadata = std::map<std::string, std::string>;

// The tensors of a file, and its metadata where asked for. A tensor points into the mapping where its
// elements are aligned, as they are in every file that this library writes; else it is a copy.
// dtypes: F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL, C64.
// Throws Error(invalid_argument) for a header that is longer than the file (or 100 MB), is not JSON,
// has duplicate names, or whose byte ranges overlap, leave gaps, reach beyond the file or disagree
// with the shapes.
[[nodiscard]] TensorMap read_safetensors(const std::filesystem::path& path, Metadata* metadata = nullptr);

// The same of a file in memory, which `owner` keeps alive. `name` stands in messages.
[[nodiscard]] TensorMap parse_safetensors(std::span<const std::byte> bytes, std::shared_ptr<void> owner,
                                          const std::string& name, Metadata* metadata = nullptr);

// Writes the tensors (on the CPU, any strides), larger elements first and then by name, the first
// element at a multiple of 64 bytes: the same tensors give the same bytes. The write is atomic
// (AtomicFile). Tensors that share memory are each written out.
void write_safetensors(const std::filesystem::path& path, const TensorMap& tensors,
                       const Metadata& metadata = {});

}  // namespace krait::io
