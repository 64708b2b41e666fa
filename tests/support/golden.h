// Files that independent implementations made, and comparisons with them.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "krait/core/tensor.h"
#include "krait/io/npy.h"

namespace krait::testing {

inline std::filesystem::path golden(const std::string& directory) {
  // A program that was built elsewhere is told where the files are.
  const char* moved = std::getenv("KRAIT_GOLDEN_DIR");
  return std::filesystem::path(moved != nullptr ? moved : KRAIT_GOLDEN_DIR) / directory;
}

inline Tensor golden_array(const std::string& directory, const std::string& name) {
  return io::read_npy(golden(directory) / name);
}

// The largest absolute difference of two tensors of one shape; NaN anywhere gives infinity.
inline double max_difference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.shape(), b.shape());
  if (a.shape() != b.shape()) return INFINITY;
  const Tensor x = a.to(DType::f64).contiguous();
  const Tensor y = b.to(DType::f64).contiguous();
  double worst = 0.0;
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    const double difference = std::abs(x.data<double>()[i] - y.data<double>()[i]);
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  return worst;
}

inline std::vector<std::int64_t> row_of(const Tensor& ids, std::int64_t row) {
  const Tensor flat = ids.to(DType::i64).contiguous();
  const auto width = static_cast<std::size_t>(flat.size(1));
  const auto span = flat.span<std::int64_t>().subspan(static_cast<std::size_t>(row) * width, width);
  return {span.begin(), span.end()};
}

}  // namespace krait::testing
