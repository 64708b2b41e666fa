#include "krait/core/tensor.h"

#include <gtest/gtest.h>

#include <numeric>

#include "krait/core/error.h"

namespace krait {
namespace {

Tensor iota(const Dims& shape) {
  Tensor t = Tensor::empty(shape);
  std::iota(t.data<float>(), t.data<float>() + t.numel(), 0.0F);
  return t;
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Tensor, AbsentByDefault) {
  const Tensor t;
  EXPECT_FALSE(t);
  EXPECT_NE(message_of([&] { (void)t.data<float>(); }), "");
}

TEST(Tensor, ViewsShareMemory) {
  const Tensor t = iota({2, 3, 4});
  const Tensor row = t.select(0, 1).select(0, 2);
  ASSERT_EQ(row.shape(), (Dims{4}));
  EXPECT_EQ(row.data<float>()[0], 20.0F);
  const Tensor part = t.slice(2, 1, 3);
  EXPECT_FALSE(part.is_contiguous());
  EXPECT_EQ(part.contiguous().data<float>()[3], 6.0F);
  EXPECT_EQ(t.transpose(0, 2).clone().data<float>()[1], 12.0F);
  EXPECT_EQ(t.permute({2, 0, 1}).shape(), (Dims{4, 2, 3}));
  EXPECT_EQ(t.unsqueeze(1).shape(), (Dims{2, 1, 3, 4}));
  EXPECT_EQ(t.unsqueeze(1).squeeze(1).strides(), t.strides());
}

TEST(Tensor, ExpandRepeats) {
  const Tensor t = iota({3, 1});
  const Tensor wide = t.expand({2, 3, 2}).clone();
  EXPECT_EQ(wide.data<float>()[11], 2.0F);
  EXPECT_THROW((void)t.expand({2, 2}), Error);
}

TEST(Tensor, ViewSplitsAndJoinsWhereStridesAllow) {
  const Tensor t = iota({4, 6});
  EXPECT_EQ(t.view({2, 2, -1}).shape(), (Dims{2, 2, 6}));
  const Tensor left = t.slice(1, 0, 4);
  EXPECT_EQ(left.view({4, 2, 2}).clone().data<float>()[4], 6.0F);
  EXPECT_EQ(left.view({2, 2, 4}).clone().data<float>()[8], 12.0F);
  EXPECT_THROW((void)left.view({16}), Error);
  EXPECT_EQ(iota({0, 3}).view({3, 0}).numel(), 0);
}

TEST(Tensor, ConvertsBetweenAnyTwoTypes) {
  const Tensor t = Tensor::from<float>({1.5F, -2.0F, 65536.0F});
  EXPECT_EQ(t.to(DType::bf16).to(DType::f64).data<double>()[0], 1.5);
  EXPECT_EQ(t.to(DType::i64).data<std::int64_t>()[1], -2);
  EXPECT_EQ(static_cast<float>(t.to(DType::f16).data<f16>()[2]), std::numeric_limits<float>::infinity());
  EXPECT_THROW((void)t.to(DType::c64), Error);
}

TEST(Tensor, MessagesNameWhatWasFound) {
  const Tensor t = iota({2, 3});
  EXPECT_EQ(message_of([&] { (void)t.select(1, 3); }), "index 3 of dimension 1 of a tensor of shape (2, 3)");
  EXPECT_EQ(message_of([&] { (void)t.data<double>(); }), "a tensor of dtype f32 was read as f64");
  EXPECT_NE(message_of([&] { (void)numel_of({std::int64_t{1} << 32, std::int64_t{1} << 32}); }), "");
  EXPECT_EQ(numel_of({std::int64_t{1} << 40, 0, std::int64_t{1} << 40}), 0);
}

TEST(Tensor, HugeAllocationsAreErrors) {
  try {
    (void)Tensor::empty({std::int64_t{1} << 60});
    FAIL() << "allocated";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::out_of_memory);
  }
}

}  // namespace
}  // namespace krait
