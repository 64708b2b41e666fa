#include "ops/embedding/kernels.h"

namespace krait::embedding_detail {

void reference(const Tensor& weight, std::span<const std::int64_t> ids, const Tensor& out) {
  std::int64_t row = 0;
  for (const std::int64_t id : ids) out.select(0, row++).copy_from(weight.select(0, id));
}

}  // namespace krait::embedding_detail
