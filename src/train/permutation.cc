#include "train/permutation.h"

#include <algorithm>
#include <bit>

#include "krait/core/random.h"

namespace krait::dataset {
namespace {

// Below this the network has too few different permutations; walking costs next to nothing there.
constexpr int kLeastHalfBits = 4;
// The last word of the counter keeps draws for different purposes apart.
constexpr std::uint32_t kKeys = 0;
constexpr std::uint32_t kOffset = 64;

std::uint64_t draw(std::uint64_t seed, std::uint64_t epoch, std::uint32_t purpose) {
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
  const auto words = philox4x32({low(epoch), high(epoch), 0x64617461U, purpose}, {low(seed), high(seed)});
  return (std::uint64_t{words[1]} << 32) | words[0];
}

// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31);
}

}  // namespace

Permutation::Permutation(std::int64_t n, std::uint64_t seed, std::uint64_t epoch)
    : n_(static_cast<std::uint64_t>(n)),
      half_bits_(std::max(kLeastHalfBits, (static_cast<int>(std::bit_width(n_ - 1)) + 1) / 2)) {
  for (std::uint32_t round = 0; round < kRounds; ++round) keys_[round] = draw(seed, epoch, kKeys + round);
}

std::int64_t Permutation::operator()(std::int64_t i) const {
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  auto x = static_cast<std::uint64_t>(i);
  do {
    std::uint64_t left = x >> half_bits_;
    std::uint64_t right = x & mask;
    for (const std::uint64_t key : keys_) {
      const std::uint64_t next = left ^ (mix(right ^ key) & mask);
      left = right;
      right = next;
    }
    x = (left << half_bits_) | right;
  } while (x >= n_);
  return static_cast<std::int64_t>(x);
}

std::int64_t random_offset(std::int64_t bound, std::uint64_t seed, std::uint64_t epoch) {
  // 63 random bits over any bound that a dataset has leave no bias to speak of.
  return static_cast<std::int64_t>(draw(seed, epoch, kOffset) % static_cast<std::uint64_t>(bound));
}

}  // namespace krait::dataset
