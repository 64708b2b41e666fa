// Random problems of attention, for the tests of its forward and backward.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/ops/attention.h"
#include "ops/random_tensors.h"

namespace krait::testing {

// The path to test beside the reference: that of the device.
inline AttentionPath fast_path() { return on_gpu() ? AttentionPath::automatic : AttentionPath::simd; }

struct Shape {
  std::int64_t queries;
  std::int64_t keys;
  std::int64_t heads_kv;
  std::int64_t group;
  std::int64_t head_dim;
  std::int64_t head_dim_v;
  bool causal;
};

inline std::string name_of(const Shape& s) {
  return concat("Lq ", s.queries, " Lk ", s.keys, " Hkv ", s.heads_kv, " group ", s.group, " head_dim ",
                s.head_dim, " head_dim_v ", s.head_dim_v, " causal ", s.causal);
}

inline Shape random_shape(Rng& rng, std::int64_t most_keys) {
  Shape s{.queries = coin(rng, 0.4) ? pick(rng, 1, 3) : pick(rng, 1, 90),
          .keys = pick(rng, 1, most_keys),
          .heads_kv = pick(rng, 1, 3),
          .group = pick(rng, 1, 4),
          .head_dim = pick(rng, 1, 40),
          .head_dim_v = pick(rng, 1, 40),
          .causal = coin(rng)};
  if (s.causal && s.keys < s.queries) std::swap(s.keys, s.queries);
  return s;
}

// q and k in [-range, range), v in [-1, 1).
inline AttentionArgs random_inputs(Rng& rng, const Shape& s, DType dtype, int layout, double range) {
  return {
      .q = random_tensor(rng, {s.queries, s.heads_kv * s.group, s.head_dim}, dtype, -range, range, layout),
      .k = random_tensor(rng, {s.keys, s.heads_kv, s.head_dim}, dtype, -range, range, layout),
      .v = random_tensor(rng, {s.keys, s.heads_kv, s.head_dim_v}, dtype, -1.0, 1.0, layout),
      .causal = s.causal};
}

}  // namespace krait::testing
