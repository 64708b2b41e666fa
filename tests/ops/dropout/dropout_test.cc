#include "krait/ops/dropout.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/core/random.h"

namespace krait {
namespace {

Tensor ones(std::int64_t count, DType dtype = DType::f32) {
  Tensor t = Tensor::empty({count}, dtype);
  t.fill(1.0);
  return t;
}

// The 16 bits of element `place`, by the scalar definition of the generator.
std::uint32_t bits_of(std::uint64_t seed, std::uint64_t stream, std::uint64_t place) {
  const std::uint64_t block = place / 8;
  const auto words =
      philox4x32({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32U),
                  static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32U)},
                 {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32U)});
  const std::uint32_t word = words[(place % 8) / 2];
  return place % 2 == 0 ? word & 0xffffU : word >> 16U;
}

TEST(Dropout, IsTheGeneratorByPlace) {
  Context ctx;
  for (const std::uint64_t offset : {std::uint64_t{0}, std::uint64_t{3}, (std::uint64_t{1} << 35U) - 21}) {
    SCOPED_TRACE(offset);
    const std::uint64_t seed = 0x123456789abcdef0U;
    const std::uint64_t stream = 0xfedcba9876543210U;
    const Tensor out = testing::run(
        ctx, dropout,
        {.x = ones(9001), .probability = 0.25, .seed = seed, .stream = stream, .offset = offset});
    for (std::int64_t i = 0; i < 9001; ++i) {
      const bool kept = bits_of(seed, stream, offset + static_cast<std::uint64_t>(i)) >= 16384;
      ASSERT_EQ(out.data<float>()[i], kept ? 1.0F / 0.75F : 0.0F) << i;
    }
  }
}

TEST(Dropout, KeepsTheMean) {
  Context ctx;
  for (const double p : {0.0, 0.1, 0.5, 0.9}) {
    SCOPED_TRACE(p);
    const Tensor out = testing::run(ctx, dropout, {.x = ones(200000), .probability = p, .seed = 5});
    double sum = 0.0;
    for (const float value : out.span<float>()) sum += static_cast<double>(value);
    EXPECT_NEAR(sum / 200000.0, 1.0, 5.0 * std::sqrt(p / (1.0 - p) / 200000.0) + 1e-6);
  }
}

TEST(Dropout, EveryDtypeStrideAndThreadCountDropsTheSame) {
  Context one({.threads = 1});
  Context three({.threads = 3});
  const Tensor wide =
      testing::run(one, dropout, {.x = ones(20011), .probability = 0.3, .seed = 9, .stream = 2});
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    SCOPED_TRACE(name_of(dtype));
    const Tensor out =
        testing::run(three, dropout, {.x = ones(20011, dtype), .probability = 0.3, .seed = 9, .stream = 2});
    const Tensor narrow = wide.to(dtype).to(DType::f64).contiguous();
    const Tensor found = out.to(DType::f64).contiguous();
    for (std::int64_t i = 0; i < 20011; ++i)
      ASSERT_NEAR(found.data<double>()[i], narrow.data<double>()[i], 1e-6) << i;
  }
  const Tensor matrix = Tensor::empty({7, 11});
  matrix.fill(1.0);
  const Tensor strided = Tensor::zeros({11, 7}).transpose(0, 1);
  testing::run(one, dropout, {.x = matrix, .probability = 0.3, .seed = 9, .stream = 2, .out = strided});
  const Tensor flat = strided.contiguous();
  for (std::int64_t i = 0; i < 77; ++i) EXPECT_EQ(flat.data<float>()[i], wide.data<float>()[i]) << i;
}

TEST(Dropout, WorksInPlaceAndOnNothing) {
  Context ctx;
  const Tensor x = ones(100);
  testing::run(ctx, dropout, {.x = x, .probability = 0.5, .seed = 1, .out = x});
  const Tensor again = testing::run(ctx, dropout, {.x = ones(100), .probability = 0.5, .seed = 1});
  for (std::int64_t i = 0; i < 100; ++i) EXPECT_EQ(x.data<float>()[i], again.data<float>()[i]);
  EXPECT_EQ(testing::run(ctx, dropout, {.x = ones(0), .probability = 0.5}).numel(), 0);
}

TEST(Dropout, DroppedElementsAreZeroWhateverTheyWere) {
  Context ctx;
  const Tensor x = Tensor::empty({64});
  x.fill(std::nan(""));
  const Tensor out = testing::run(ctx, dropout, {.x = x, .probability = 0.5, .seed = 1});
  int zeros = 0;
  for (const float value : out.span<float>()) zeros += value == 0.0F ? 1 : 0;
  EXPECT_GT(zeros, 10);
}

TEST(Dropout, RefusesAProbabilityOfOne) {
  Context ctx;
  EXPECT_THROW(dropout(ctx, {.x = ones(3), .probability = 1.0}), Error);
  EXPECT_THROW(dropout(ctx, {.x = ones(3), .probability = std::nan("")}), Error);
}

}  // namespace
}  // namespace krait
