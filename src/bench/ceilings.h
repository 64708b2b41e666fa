// The two loops that measure a machine: a sum that only reads, and multiply-adds that only compute.
#pragma once

#include <cstdint>

namespace krait {

float sum_floats(const float* values, std::int64_t count);
// Returns the FLOP done. `sink` has ten start values of any size and keeps the result alive.
double multiply_add(std::int64_t rounds, float* sink);

}  // namespace krait
