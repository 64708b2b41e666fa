// Counter-based random numbers (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011): the same seed, stream and counter give the same numbers on every device.
#pragma once

#include <array>
#include <cstdint>

namespace krait {

[[nodiscard]] std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                      std::array<std::uint32_t, 2> key);

class Rng {
 public:
  explicit Rng(std::uint64_t seed = 0, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  std::uint32_t next_u32();
  // Uniform in [0, 1) with 24 (float) or 53 (double) random bits.
  float uniform();
  double uniform_double();
  // Standard normal (Box and Muller).
  float normal();

  [[nodiscard]] std::uint64_t seed() const { return seed_; }
  [[nodiscard]] std::uint64_t stream() const { return stream_; }
  // 32-bit numbers drawn so far; setting it restores that point of the sequence.
  [[nodiscard]] std::uint64_t position() const { return position_; }
  void set_position(std::uint64_t position);

 private:
  std::uint64_t seed_;
  std::uint64_t stream_;
  std::uint64_t position_ = 0;
  std::array<std::uint32_t, 4> block_{};
};

}  // namespace krait
