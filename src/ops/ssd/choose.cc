// How a batch is cut for a GPU: pure functions of the shape.
#include <algorithm>
#include <cstdint>

#include "ops/ssd/kernels.h"

namespace krait::ssd_detail {
namespace {

// Rows of the last dimension can be read 16 bytes at a time, 8 elements.
bool has_vectors(const Tensor& t) {
  constexpr std::int64_t kVector = 8;
  const int last = t.ndim() - 1;
  bool aligned = reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0 && t.stride(last) == 1;
  for (int i = 0; i < last; ++i) aligned = aligned && (t.size(i) <= 1 || t.stride(i) % kVector == 0);
  return aligned;
}

}  // namespace

bool in_pairs(const Tensor& t, DType dtype) {
  if (!t) return true;
  const auto even = [&](int dim) { return t.size(dim) <= 1 || t.stride(dim) % 2 == 0; };
  return t.dtype() == dtype && t.stride(3) == 1 && even(0) && even(1) && even(2) &&
         reinterpret_cast<std::uintptr_t>(t.raw()) % static_cast<std::uintptr_t>(2 * size_of(dtype)) == 0;
}

bool suits_tensor_cores(const Problem& p) {
  constexpr std::int64_t kShortest = 16;
  const DType dtype = p.x.dtype();
  if ((dtype != DType::bf16 && dtype != DType::f16) || p.B.dtype() != dtype || p.C.dtype() != dtype)
    return false;
  if (p.discrete || !p.runs->requests.empty()) return false;
  if (p.headdim() == 0 || p.headdim() % 64 != 0) return false;
  if (p.d_state() == 0 || p.d_state() % 16 != 0 || p.d_state() > 128) return false;
  std::int64_t longest = 0;
  for (const TokenRun& run : p.runs->runs) longest = std::max(longest, run.count);
  constexpr std::int64_t kLongest = std::int64_t{1} << 30;
  if (longest < kShortest || longest > kLongest) return false;
  return has_vectors(p.x) && has_vectors(p.B) && has_vectors(p.C) && (!p.out || has_vectors(p.out)) &&
         (!p.z || (p.z.dtype() == dtype && has_vectors(p.z)));
}

bool suits_tensor_cores(const BackwardProblem& b) {
  const Problem& p = b.forward;
  const DType dtype = p.x.dtype();
  const bool by_head = !p.D || (p.D.stride(1) == 0 && (!b.dD || b.dD.ndim() == 1));
  return suits_tensor_cores(p) && by_head && !p.z && b.dout.dtype() == dtype && has_vectors(b.dout) &&
         (!b.dx || (b.dx.dtype() == dtype && has_vectors(b.dx)));
}

std::int64_t pairs_of_tiles(const Problem& p) {
  return p.groups() * ((p.heads_per_group() * (p.headdim() / 64) + 1) / 2);
}

bool suits_warpgroups(const Problem& p) {
  // Blocks count chunks in 32 bits.
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  if (!suits_tensor_cores(p) || p.z || p.heads_per_group() * (p.headdim() / 64) < 2) return false;
  std::int64_t chunks = 0;
  for (const TokenRun& run : p.runs->runs)
    chunks += std::max<std::int64_t>((run.count + kChunk - 1) / kChunk, 1);
  return chunks * pairs_of_tiles(p) < kMost;
}

std::int64_t choose_blocks(std::int64_t chunks, std::int64_t longest, std::int64_t runs, std::int64_t pairs,
                           std::int64_t multiprocessors) {
  // In times of a chunk: what handing a state on costs a block, and its share of a long unit, whose chunks
  // are walked for the state first. A unit is cut into at most kPieces: each of its blocks adds up the states
  // that all before it hand on.
  constexpr double kHandOn = 4.0;
  constexpr double kTwice = 1.5;
  constexpr std::int64_t kPieces = 32;
  const std::int64_t units = std::max<std::int64_t>(runs * pairs, 1);
  const std::int64_t total = std::max<std::int64_t>(chunks * pairs, 1);
  if (units >= multiprocessors) return multiprocessors;
  const std::int64_t blocks = std::min({multiprocessors, total, units * kPieces});
  const double share = static_cast<double>(total) / static_cast<double>(blocks);
  const auto whole = static_cast<double>(longest);
  const double cut = share * (whole > share ? kTwice : 1.0) + kHandOn;
  return cut < whole ? blocks : units;
}

std::int64_t choose_chunked(std::int64_t runs, std::int64_t longest, std::int64_t heads,
                            std::int64_t headdim) {
  // With so many blocks a GPU is busy. With fewer, runs are cut, and then so that blocks come in several
  // waves; below kShortest the passes over states cost more than they gain.
  constexpr std::int64_t kEnough = 256;
  constexpr std::int64_t kBlocks = 1184;
  constexpr std::int64_t kShortest = 256;
  const auto whole_chunks = [](std::int64_t tokens) { return (tokens + kChunk - 1) / kChunk * kChunk; };
  const std::int64_t blocks = std::max<std::int64_t>(runs * heads * ((headdim + 63) / 64), 1);
  const std::int64_t pieces = blocks >= kEnough ? 1 : (kBlocks + blocks - 1) / blocks;
  return whole_chunks(std::max({(longest + pieces - 1) / pieces, std::min(kShortest, longest), kChunk}));
}

std::int64_t choose_walk(std::int64_t runs, std::int64_t longest, std::int64_t heads, std::int64_t headdim) {
  // Blocks that keep a GPU busy, and the shortest piece whose passes over states cost less than they gain.
  constexpr std::int64_t kBlocks = 512;
  constexpr std::int64_t kShortest = 128;
  const std::int64_t blocks = std::max<std::int64_t>(runs * heads * ((headdim + 31) / 32), 1);
  const std::int64_t pieces = (kBlocks + blocks - 1) / blocks;
  if (pieces == 1) return std::max<std::int64_t>(longest, 1);
  return std::max((longest + pieces - 1) / pieces, std::min(kShortest, std::max<std::int64_t>(longest, 1)));
}

std::int64_t choose_parts(std::int64_t independent, std::int64_t heads_per_group, std::int64_t blocks) {
  const std::int64_t wanted = (blocks + independent - 1) / std::max<std::int64_t>(independent, 1);
  return std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(heads_per_group, 1));
}

BackwardPath choose_backward_path(bool suits_tensor_cores, int compute_capability, bool warpgroup_products,
                                  int shared_memory, const BackwardMemory& needed) {
  if (!suits_tensor_cores || compute_capability < 80) return BackwardPath::plain;
  if (warpgroup_products && shared_memory >= needed.warpgroups) return BackwardPath::warpgroups;
  return shared_memory >= needed.chunks ? BackwardPath::chunks : BackwardPath::plain;
}

std::int64_t choose_warpgroup_walk(std::int64_t runs, std::int64_t longest, std::int64_t heads,
                                   std::int64_t headdim) {
  // Runs that are cut are walked twice, the first time by kernels that take as long for a chunk as several of
  // this walk: it pays only for few blocks and long runs.
  constexpr std::int64_t kEnough = 14;
  constexpr std::int64_t kLong = 8192;
  constexpr std::int64_t kBlocks = 132;
  constexpr std::int64_t kShortest = 512;
  // A pair of tiles each way.
  const std::int64_t blocks = std::max<std::int64_t>(runs * heads * ((headdim + 63) / 64), 1);
  const std::int64_t pieces = blocks >= kEnough || longest <= kLong ? 1 : (kBlocks + blocks - 1) / blocks;
  const std::int64_t tokens = std::max((longest + pieces - 1) / pieces, std::min(kShortest, longest));
  return std::max((tokens + kChunk - 1) / kChunk, std::int64_t{1}) * kChunk;
}

std::int64_t choose_warpgroup_parts(std::int64_t independent, std::int64_t heads_per_group) {
  // The least time of the blocks' waves, a block taking one unit for each head and kStart for what comes
  // before and after; more parts have to be that much better, as their sums are added afterwards.
  constexpr std::int64_t kWave = 132;
  constexpr std::int64_t kStart = 3;
  const auto time_of = [&](std::int64_t parts) {
    const std::int64_t waves = (independent * parts + kWave - 1) / kWave;
    return waves * ((heads_per_group + parts - 1) / parts + kStart);
  };
  std::int64_t best = 1;
  for (std::int64_t parts = 2; parts <= std::min<std::int64_t>(heads_per_group, 64); ++parts)
    if (time_of(parts) * 10 < time_of(best) * 9) best = parts;
  return best;
}

}  // namespace krait::ssd_detail
