// What the tests of norm and its backward share.
#pragma once

#include <array>
#include <cstdint>

#include "krait/ops/norm.h"
#include "ops/random_tensors.h"

namespace krait::testing {

inline constexpr std::array kKinds{NormKind::rms, NormKind::layer};

struct NormSizes {
  Dims shape;  // (C), (rows, C) or (.., .., C)
  std::int64_t channels;
  std::int64_t group_size;  // at times 0, for one group
};

// Channels around the widths of vectors, and at most `most_rows` rows (20 of three dimensions).
inline NormSizes random_sizes(Rng& rng, std::int64_t most_rows) {
  constexpr std::array<std::int64_t, 12> kChannels{1, 2, 3, 7, 8, 15, 16, 33, 64, 100, 257, 768};
  NormSizes s;
  s.channels = kChannels[static_cast<std::size_t>(pick(rng, 0, 11))];
  const std::int64_t groups = s.channels % 3 == 0 && coin(rng) ? 3 : s.channels % 4 == 0 && coin(rng) ? 4 : 1;
  s.shape = coin(rng, 0.2)   ? Dims{s.channels}
            : coin(rng, 0.6) ? Dims{pick(rng, 1, most_rows), s.channels}
                             : Dims{pick(rng, 1, 4), pick(rng, 1, 5), s.channels};
  s.group_size = groups == 1 && coin(rng) ? 0 : s.channels / groups;
  return s;
}

}  // namespace krait::testing
