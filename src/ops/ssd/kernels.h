// The GPU side of ssd, declared without CUDA's headers.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "ops/ssd/backward.h"
#include "ops/ssd/problem.h"

namespace krait::ssd_detail {

// Every path of the forward and backward on a GPU; the caller has cut the batch into runs, and f64 does not
// come here. Places of padding tokens are set to 0.
void run_cuda(Context& ctx, const Problem& problem);
void run_cuda_backward(Context& ctx, const BackwardProblem& problem);

// Tokens of a piece that one block walks, pieces of a run side by side: all of the longest run where there is
// work enough without cutting.
[[nodiscard]] std::int64_t choose_walk(std::int64_t runs, std::int64_t longest, std::int64_t heads,
                                       std::int64_t headdim);
// Blocks of heads of one group whose sums for dB and dC are kept apart. By the shape alone: the order of
// additions depends on it.
[[nodiscard]] std::int64_t choose_parts(std::int64_t independent, std::int64_t heads_per_group);

}  // namespace krait::ssd_detail
