#include "train/permutation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

namespace krait::dataset {
namespace {

std::vector<std::int64_t> images(std::int64_t n, std::uint64_t seed, std::uint64_t epoch) {
  const Permutation order(n, seed, epoch);
  std::vector<std::int64_t> out;
  for (std::int64_t i = 0; i < n; ++i) out.push_back(order(i));
  return out;
}

TEST(Permutation, HasEachImageOnce) {
  std::vector<std::int64_t> sizes(300);
  std::iota(sizes.begin(), sizes.end(), 1);
  for (const std::int64_t large : {1023, 1024, 1025, 65536, 65537, 300'007}) sizes.push_back(large);
  for (const std::int64_t n : sizes) {
    SCOPED_TRACE(n);
    std::vector<std::int64_t> sorted = images(n, 5, static_cast<std::uint64_t>(n) % 3);
    std::sort(sorted.begin(), sorted.end());
    for (std::int64_t i = 0; i < n; ++i) ASSERT_EQ(sorted[static_cast<std::size_t>(i)], i);
  }
}

TEST(Permutation, StaysInRangesBeyond32Bits) {
  constexpr std::int64_t n = (std::int64_t{1} << 40) + 7;
  const Permutation order(n, 1, 2);
  for (std::int64_t i = n - 1000; i < n; ++i) {
    EXPECT_GE(order(i), 0);
    EXPECT_LT(order(i), n);
  }
}

TEST(Permutation, ChangesWithSeedAndEpoch) {
  const auto first = images(1000, 1, 0);
  EXPECT_EQ(images(1000, 1, 0), first);
  EXPECT_NE(images(1000, 2, 0), first);
  EXPECT_NE(images(1000, 1, 1), first);
  EXPECT_NE(images(1000, std::uint64_t{1} << 32, 0), images(1000, 0, 0));
}

// All 24 orders of four come about equally often: 12,000 draws give 500 each, with a standard deviation
// of 22.
TEST(Permutation, IsFair) {
  std::map<std::vector<std::int64_t>, int> times;
  for (std::uint64_t epoch = 0; epoch < 12'000; ++epoch) ++times[images(4, 9, epoch)];
  ASSERT_EQ(times.size(), 24U);
  for (const auto& [order, count] : times) EXPECT_NEAR(count, 500, 110);
}

// Where something goes depends on where it was by no pattern: the mean distance of neighbours is a third.
TEST(Permutation, ScattersNeighbours) {
  constexpr std::int64_t n = 100'000;
  const auto order = images(n, 3, 3);
  double sum = 0;
  for (std::size_t i = 1; i < order.size(); ++i)
    sum += static_cast<double>(std::abs(order[i] - order[i - 1]));
  EXPECT_NEAR(sum / n / n, 1.0 / 3, 0.01);
}

// A run that was stopped goes on in the same order with a later version of the program.
TEST(Permutation, IsPinned) {
  EXPECT_EQ(images(10, 1, 0), (std::vector<std::int64_t>{8, 5, 1, 6, 2, 3, 7, 0, 9, 4}));
  EXPECT_EQ(random_offset(1000, 1, 0), 39);
}

TEST(RandomOffset, CoversItsRange) {
  std::vector<int> times(10);
  for (std::uint64_t epoch = 0; epoch < 10'000; ++epoch)
    ++times.at(static_cast<std::size_t>(random_offset(10, 4, epoch)));
  for (const int count : times) EXPECT_NEAR(count, 1000, 150);
  EXPECT_EQ(random_offset(1, 4, 4), 0);
}

}  // namespace
}  // namespace krait::dataset
