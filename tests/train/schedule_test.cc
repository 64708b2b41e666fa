#include "krait/train/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace krait {
namespace {

constexpr double kLr = 0.4;
constexpr double kMin = 0.1;

double rate(Schedule schedule, std::int64_t warmup, std::int64_t step, std::int64_t decay = 0) {
  return learning_rate(
      {.schedule = schedule, .steps = 20, .warmup = warmup, .decay = decay, .lr = kLr, .min_lr = kMin}, step);
}

TEST(Schedule, ConstantIsTheRateFromTheFirstStepOn) {
  for (const std::int64_t step : {0, 1, 10, 19, 20, 1000})
    EXPECT_EQ(rate(Schedule::constant, 0, step), kLr) << step;
}

TEST(Schedule, WarmupRisesAlongALineWhateverFollows) {
  for (const Schedule schedule : {Schedule::constant, Schedule::linear, Schedule::cosine, Schedule::wsd}) {
    SCOPED_TRACE(name_of(schedule));
    EXPECT_DOUBLE_EQ(rate(schedule, 4, 0), kLr / 4);
    EXPECT_DOUBLE_EQ(rate(schedule, 4, 2), kLr * 3 / 4);
    EXPECT_DOUBLE_EQ(rate(schedule, 4, 3), kLr);
    EXPECT_DOUBLE_EQ(rate(schedule, 4, 4), kLr);
  }
}

TEST(Schedule, LinearFallsToWhereTheStepAfterTheLastWouldBeTheMinimum) {
  EXPECT_DOUBLE_EQ(rate(Schedule::linear, 4, 12), (kLr + kMin) / 2);
  EXPECT_DOUBLE_EQ(rate(Schedule::linear, 4, 19), kMin + (kLr - kMin) / 16);
  EXPECT_DOUBLE_EQ(rate(Schedule::linear, 4, 20), kMin);
  EXPECT_DOUBLE_EQ(rate(Schedule::linear, 4, 500), kMin);
  EXPECT_DOUBLE_EQ(rate(Schedule::linear, 0, 0), kLr);
}

TEST(Schedule, CosineIsSlowAtBothEnds) {
  EXPECT_DOUBLE_EQ(rate(Schedule::cosine, 4, 12), (kLr + kMin) / 2);
  EXPECT_DOUBLE_EQ(rate(Schedule::cosine, 4, 8),
                   kMin + (kLr - kMin) * 0.5 * (1 + std::cos(std::numbers::pi / 4)));
  EXPECT_GT(rate(Schedule::cosine, 4, 5), rate(Schedule::linear, 4, 5));
  EXPECT_LT(rate(Schedule::cosine, 4, 19), rate(Schedule::linear, 4, 19));
}

TEST(Schedule, WsdStaysAndFallsAtTheEnd) {
  EXPECT_DOUBLE_EQ(rate(Schedule::wsd, 4, 10, 5), kLr);
  EXPECT_DOUBLE_EQ(rate(Schedule::wsd, 4, 15, 5), kLr);
  EXPECT_DOUBLE_EQ(rate(Schedule::wsd, 4, 16, 5), kLr - (kLr - kMin) / 5);
  EXPECT_DOUBLE_EQ(rate(Schedule::wsd, 4, 19, 5), kLr - (kLr - kMin) * 4 / 5);
  // A fall that is longer than what the warmup leaves begins after the warmup.
  EXPECT_DOUBLE_EQ(rate(Schedule::wsd, 10, 10, 20), kLr);
  EXPECT_DOUBLE_EQ(rate(Schedule::wsd, 10, 15, 20), (kLr + kMin) / 2);
}

TEST(Schedule, WarmupOverTheWholeRun) {
  EXPECT_DOUBLE_EQ(rate(Schedule::cosine, 20, 19), kLr);
  EXPECT_DOUBLE_EQ(rate(Schedule::cosine, 20, 20), kLr);
  EXPECT_DOUBLE_EQ(rate(Schedule::cosine, 20, 21), kMin);
}

}  // namespace
}  // namespace krait
