// Batches that someone has put together: (steps, B, L + 1) ids in a .npy file, taken in order.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "krait/core/tensor.h"
#include "krait/train/dataset.h"

namespace krait::dataset {

// A .npy file with an array of three dimensions. Throws Error where it cannot be read.
[[nodiscard]] bool holds_fixed_batches(const std::filesystem::path& path);

// `ids` has three dimensions and an integer dtype. Throws Error(invalid_argument), naming the file, where its
// shape does not fit the options or an id is outside of the vocabulary.
[[nodiscard]] std::unique_ptr<Dataset> fixed_batches(const Tensor& ids, const std::string& name,
                                                     const DatasetOptions& options);

// Makes `tensor` one of this shape and dtype; what it holds is kept where it is one.
void reshape(Tensor& tensor, const Dims& shape, DType dtype);

}  // namespace krait::dataset
