// How a batch is cut for a GPU: pure functions of the shape.
#include <algorithm>

#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {

std::int64_t choose_walk(std::int64_t runs, std::int64_t longest, std::int64_t heads, std::int64_t headdim) {
  // Blocks that keep a GPU busy, and the shortest piece whose passes over states cost less than they gain.
  constexpr std::int64_t kBlocks = 512;
  constexpr std::int64_t kShortest = 128;
  const std::int64_t blocks = std::max<std::int64_t>(runs * heads * ((headdim + 31) / 32), 1);
  const std::int64_t pieces = (kBlocks + blocks - 1) / blocks;
  if (pieces == 1) return std::max<std::int64_t>(longest, 1);
  return std::max((longest + pieces - 1) / pieces, std::min(kShortest, std::max<std::int64_t>(longest, 1)));
}

std::int64_t choose_parts(std::int64_t independent, std::int64_t heads_per_group) {
  constexpr std::int64_t kBlocks = 256;
  const std::int64_t wanted = (kBlocks + independent - 1) / std::max<std::int64_t>(independent, 1);
  return std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(heads_per_group, 1));
}

}  // namespace krait::ssd_detail
