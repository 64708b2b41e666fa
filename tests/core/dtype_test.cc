#include "krait/core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace krait {
namespace {

TEST(DType, NamesRoundTrip) {
  for (const DType d : {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i8, DType::u8, DType::i16,
                        DType::i32, DType::i64, DType::boolean, DType::c64, DType::c128})
    EXPECT_EQ(parse_dtype(name_of(d)), d);
  EXPECT_FALSE(parse_dtype("float"));
}

TEST(DType, EveryHalfSurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    f16 h;
    h.bits = static_cast<std::uint16_t>(bits);
    const auto value = static_cast<float>(h);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(f16(value))));
    } else {
      ASSERT_EQ(f16(value).bits, h.bits);
    }
    bf16 b;
    b.bits = static_cast<std::uint16_t>(bits);
    const auto wide = static_cast<float>(b);
    if (!std::isnan(wide)) {
      ASSERT_EQ(bf16(wide).bits, b.bits);
    }
  }
}

// Between two neighbouring halves the nearer one is taken, and the even one in the middle.
TEST(DType, HalfRoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x7bff; ++bits) {
    f16 low;
    f16 high;
    low.bits = static_cast<std::uint16_t>(bits);
    high.bits = static_cast<std::uint16_t>(bits + 1);
    const float a = static_cast<float>(low);
    const float b = static_cast<float>(high);
    const float middle = a + (b - a) / 2;
    ASSERT_EQ(f16(middle).bits, (bits & 1U) == 0 ? low.bits : high.bits) << bits;
    ASSERT_EQ(f16(std::nextafter(middle, a)).bits, low.bits) << bits;
    ASSERT_EQ(f16(std::nextafter(middle, b)).bits, high.bits) << bits;
  }
  EXPECT_EQ(f16(65519.0F).bits, 0x7bff);
  EXPECT_EQ(f16(65520.0F).bits, 0x7c00);
}

TEST(DType, BfloatRoundsToNearestEven) {
  EXPECT_EQ(bf16(1.0F + 0x1p-8F).bits, 0x3f80);
  EXPECT_EQ(bf16(1.0F + 0x1.8p-7F).bits, 0x3f82);
  EXPECT_TRUE(std::isinf(static_cast<float>(bf16(std::numeric_limits<float>::max()))));
  EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::numeric_limits<float>::quiet_NaN()))));
}

}  // namespace
}  // namespace krait
