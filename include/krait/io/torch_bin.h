// pytorch_model.bin: what torch.save writes for a state_dict since PyTorch 1.6, a zip archive of
// uncompressed entries: <prefix>/data.pkl (a pickle of the names, shapes and strides), <prefix>/data/<key>
// (one storage each) and a few small ones.
//
// A pickle is a program, and Python's loader runs what it says. This reader runs nothing: it knows
// plain containers, numbers, text and the handful of names with which torch describes tensors; any
// other name in the file is an error that says which.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "krait/io/tensor_file.h"

namespace krait::io {

// The tensors of a state_dict, which is the pickled object itself or stands under its key "state_dict"
// or "model". Values that are not tensors are left out. Storages point into the mapping; tensors that
// share a storage in the file share it here, with their strides and offsets. The device on which a
// storage was saved is ignored.
// dtypes: f32, f64, f16, bf16, i64, i32, i16, i8, u8, bool, complex64, complex128.
// Throws Error(invalid_argument) for the older format (with the command that converts it), damaged or
// compressed archives, storages whose size is not what the pickle says, and strides that reach outside
// of their storage.
[[nodiscard]] TensorMap read_torch_bin(const std::filesystem::path& path);

// The same of a file in memory, which `owner` keeps alive. `name` stands in messages.
[[nodiscard]] TensorMap parse_torch_bin(std::span<const std::byte> bytes, std::shared_ptr<void> owner,
                                        const std::string& name);

// Writes a state_dict of the tensors (on the CPU, any strides) that torch.load(weights_only=True) reads. The
// write is atomic (AtomicFile). Names that map to one and the same contiguous tensor share a storage.
void write_torch_bin(const std::filesystem::path& path, const TensorMap& tensors);

}  // namespace krait::io
