#include "ops/overlap.h"

#include <gtest/gtest.h>

#include "krait/core/tensor.h"

namespace krait {
namespace {

TEST(MayOverlap, ColumnsOfOneMatrix) {
  const Tensor wide = Tensor::zeros({6, 20});
  EXPECT_FALSE(may_overlap(wide.slice(1, 0, 8), wide.slice(1, 8, 20)));
  EXPECT_FALSE(may_overlap(wide.slice(1, 12, 20), wide.slice(1, 0, 12)));
  EXPECT_TRUE(may_overlap(wide.slice(1, 0, 9), wide.slice(1, 8, 20)));
  EXPECT_TRUE(may_overlap(wide.slice(1, 0, 8), wide));
  EXPECT_FALSE(may_overlap(wide.slice(0, 0, 3), wide.slice(0, 3, 6)));
  EXPECT_FALSE(may_overlap(wide, Tensor::zeros({6, 20})));
}

// (B, L, C) columns, transposed ones too: B and L continue each other.
TEST(MayOverlap, ColumnsOverSeveralDimensions) {
  const Tensor wide = Tensor::zeros({3, 4, 20});
  const Tensor left = wide.slice(2, 0, 8);
  const Tensor right = wide.slice(2, 8, 20);
  EXPECT_FALSE(may_overlap(left, right));
  EXPECT_FALSE(may_overlap(left.transpose(1, 2), right.transpose(0, 2)));
  EXPECT_TRUE(may_overlap(wide.slice(2, 0, 9).transpose(1, 2), right));
  // Neither row nor batch continues the other here: still told apart by the larger period.
  const Tensor rows = wide.slice(1, 0, 2);
  EXPECT_FALSE(may_overlap(rows, wide.slice(1, 2, 4)));
  EXPECT_TRUE(may_overlap(rows, wide.slice(1, 1, 3)));
}

TEST(MayOverlap, NothingOverlapsAnAbsentOrEmptyTensor) {
  const Tensor t = Tensor::zeros({2, 3});
  EXPECT_FALSE(may_overlap(t, {}));
  EXPECT_FALSE(may_overlap({}, {}));
  EXPECT_FALSE(may_overlap(t, t.slice(1, 1, 1)));
  EXPECT_TRUE(may_overlap(t, t));
  EXPECT_TRUE(may_overlap(t.select(0, 1).select(0, 2), t));
}

}  // namespace
}  // namespace krait
