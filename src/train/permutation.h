// A pseudo-random permutation of [0, n) that costs no memory: a Feistel network on the smallest square of a
// power of two that holds n, applied again while it leads outside (cycle walking; Black and Rogaway, "Ciphers
// with arbitrary finite domains", CT-RSA 2002).
#pragma once

#include <array>
#include <cstdint>

namespace krait::dataset {

class Permutation {
 public:
  // Another one for each seed and epoch. n >= 1.
  Permutation(std::int64_t n, std::uint64_t seed, std::uint64_t epoch);

  // The image of i, 0 <= i < n.
  [[nodiscard]] std::int64_t operator()(std::int64_t i) const;

 private:
  static constexpr int kRounds = 8;

  std::uint64_t n_;
  int half_bits_;
  std::array<std::uint64_t, kRounds> keys_{};
};

// A number drawn from [0, bound), bound >= 1: another for each seed and epoch, independent of the
// permutation.
[[nodiscard]] std::int64_t random_offset(std::int64_t bound, std::uint64_t seed, std::uint64_t epoch);

}  // namespace krait::dataset
