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

// Whether two neighbours in the last dimension of `t` (n, H, P, N), absent or of `dtype`, can be read and
// written at once.
[[nodiscard]] bool in_pairs(const Tensor& t, DType dtype);
// Whether the kernels for tensor cores take a problem: x, B, C, z and out of one 16-bit dtype whose rows are
// vectors of 16 bytes, headdim a multiple of 64, d_state one of 16 up to 128, and no states asked for on the
// way.
[[nodiscard]] bool suits_tensor_cores(const Problem& problem);
// The backward's: dout and dx likewise, D by head, no z.
[[nodiscard]] bool suits_tensor_cores(const BackwardProblem& problem);
// Tokens of a piece of a run that one of their blocks walks: whole chunks of kChunk.
inline constexpr std::int64_t kChunk = 64;
[[nodiscard]] std::int64_t choose_chunked(std::int64_t runs, std::int64_t longest, std::int64_t heads,
                                          std::int64_t headdim);

// The forward's with products of warpgroups: what suits_tensor_cores, without z, with two tiles of 64
// channels or more in a group of heads.
[[nodiscard]] bool suits_warpgroups(const Problem& problem);
// Pairs of such tiles in all groups, the last one of a group with one tile where their number is odd.
[[nodiscard]] std::int64_t pairs_of_tiles(const Problem& problem);
// Blocks that share `chunks` x `pairs` chunks: as many as a GPU has multiprocessors, or one for each run and
// pair where cutting them costs more than it gains. `longest` counts the chunks of the longest run.
[[nodiscard]] std::int64_t choose_blocks(std::int64_t chunks, std::int64_t longest, std::int64_t runs,
                                         std::int64_t pairs, std::int64_t multiprocessors);

// Tokens of a piece that one block of the plain kernels walks, pieces of a run side by side: all of the
// longest run where there is work enough without cutting.
[[nodiscard]] std::int64_t choose_walk(std::int64_t runs, std::int64_t longest, std::int64_t heads,
                                       std::int64_t headdim);
// Blocks of heads of one group whose sums for dB and dC are kept apart, for about `blocks` blocks in all
// where `independent` are there without that. By the shape alone: the order of additions depends on it.
[[nodiscard]] std::int64_t choose_parts(std::int64_t independent, std::int64_t heads_per_group,
                                        std::int64_t blocks);

// The kernels of the backward: by tokens, by chunks on tensor cores, and the same on products of warpgroups.
enum class BackwardPath { plain, chunks, warpgroups };
// Bytes of shared memory that a block of each takes.
struct BackwardMemory {
  int chunks;
  int warpgroups;
};
[[nodiscard]] BackwardPath choose_backward_path(bool suits_tensor_cores, int compute_capability,
                                                bool warpgroup_products, int shared_memory,
                                                const BackwardMemory& needed);
// As choose_chunked and choose_parts for the kernels on products of warpgroups, of which a multiprocessor
// holds one block: of two tiles whose states are walked, both ways at once, or of a chunk.
[[nodiscard]] std::int64_t choose_warpgroup_walk(std::int64_t runs, std::int64_t longest, std::int64_t heads,
                                                 std::int64_t headdim);
[[nodiscard]] std::int64_t choose_warpgroup_parts(std::int64_t independent, std::int64_t heads_per_group);

}  // namespace krait::ssd_detail
