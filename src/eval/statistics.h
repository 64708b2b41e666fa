// Means over documents and their standard errors.
#pragma once

#include <cstdint>
#include <span>

#include "krait/core/context.h"

namespace krait {

[[nodiscard]] double mean(std::span<const double> values);
// Of the mean of at least two values: their sample deviation over the root of their count.
[[nodiscard]] double standard_error_of_mean(std::span<const double> values);

// The sample deviation of exp(-mean) over `iterations` resamplings of at least two values, in steps of 1,000
// (of `iterations` where that is less), rounded down; at least two. The draws are those of Python's
// random.choices, each step seeded with its number, which gives the numbers of lm-evaluation-harness.
[[nodiscard]] double bootstrap_error_of_perplexity(const Context& ctx, std::span<const double> values,
                                                   std::int64_t iterations);

}  // namespace krait
