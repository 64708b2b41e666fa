// Named tensors in files: one checkpoint of one or more files, whatever its format.
//
// Files are mapped, not read: opening costs what the headers cost, and an element is read from disk
// when it is first used. The tensors point into the mapping and keep it alive. They are read-only:
// clone() one before writing to it. Nothing in a file is ever executed, and whatever a file claims is
// checked against its real size before it is believed.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include "krait/core/tensor.h"

namespace krait::io {

using TensorMap = std::map<std::string, Tensor, std::less<>>;

// The tensors of one file. The format is told by the content: safetensors, or torch.save's zip.
[[nodiscard]] TensorMap read_tensor_file(const std::filesystem::path& path);

// The tensors of a checkpoint. `path` is a directory, in which the first of these is taken
//   model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json
// or one such file. An index is a JSON object whose "weight_map" maps the name of a tensor to the name
// of the file beside the index that holds it; tensors that it does not list are left out.
// Throws Error(not_found) with what was looked for, and Error(invalid_argument) where a file is
// damaged, a shard's name is not a plain file name, or a listed tensor is not in its shard.
[[nodiscard]] TensorMap read_checkpoint(const std::filesystem::path& path);

// Asks the system to start reading what the tensors point to; does not wait for it.
void prefetch(const TensorMap& tensors);

}  // namespace krait::io
