#include "krait/core/random.h"

#include <cmath>
#include <numbers>

namespace krait {

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) {
  constexpr std::uint64_t kMul0 = 0xD2511F53;
  constexpr std::uint64_t kMul1 = 0xCD9E8D57;
  constexpr std::uint32_t kWeyl0 = 0x9E3779B9;
  constexpr std::uint32_t kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = kMul0 * counter[0];
    const std::uint64_t p1 = kMul1 * counter[2];
    counter = {static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(p1),
               static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(p0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

std::uint32_t Rng::next_u32() {
  const std::uint64_t block = position_ / 4;
  if (position_ % 4 == 0)
    block_ = philox4x32({static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                         static_cast<std::uint32_t>(stream_), static_cast<std::uint32_t>(stream_ >> 32)},
                        {static_cast<std::uint32_t>(seed_), static_cast<std::uint32_t>(seed_ >> 32)});
  return block_[position_++ % 4];
}

float Rng::uniform() { return static_cast<float>(next_u32() >> 8) * 0x1p-24F; }

double Rng::uniform_double() {
  const std::uint64_t high = next_u32() >> 6;
  const std::uint64_t low = next_u32() >> 5;
  return static_cast<double>((high << 27) | low) * 0x1p-53;
}

float Rng::normal() {
  const float radius = std::sqrt(-2.0F * std::log(1.0F - uniform()));
  return radius * std::cos(2.0F * std::numbers::pi_v<float> * uniform());
}

void Rng::set_position(std::uint64_t position) {
  position_ = position & ~std::uint64_t{3};
  while (position_ < position) next_u32();
}

}  // namespace krait
