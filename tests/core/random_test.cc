#include "krait/core/random.h"

#include <gtest/gtest.h>

#include <cmath>

namespace krait {
namespace {

// Known answers published with Random123.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Rng, PositionRestores) {
  Rng a(7, 3);
  for (int i = 0; i < 5; ++i) a.next_u32();
  Rng b(7, 3);
  b.set_position(a.position());
  for (int i = 0; i < 9; ++i) EXPECT_EQ(a.next_u32(), b.next_u32());
}

TEST(Rng, MomentsOfUniformAndNormal) {
  Rng rng(1);
  double mean = 0;
  double normal_mean = 0;
  double normal_square = 0;
  constexpr int kCount = 100000;
  for (int i = 0; i < kCount; ++i) {
    const float u = rng.uniform();
    ASSERT_GE(u, 0.0F);
    ASSERT_LT(u, 1.0F);
    mean += u;
    const double n = rng.normal();
    normal_mean += n;
    normal_square += n * n;
  }
  EXPECT_NEAR(mean / kCount, 0.5, 0.005);
  EXPECT_NEAR(normal_mean / kCount, 0.0, 0.015);
  EXPECT_NEAR(normal_square / kCount, 1.0, 0.02);
}

}  // namespace
}  // namespace krait
