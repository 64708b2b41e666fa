// Which of the kernels that cuBLASLt proposes multiplies, on Hopper.
#include <algorithm>
#include <cmath>

#include "ops/linear/kernels.h"

namespace krait::linear_detail {
namespace {

// A kernel with two tiles of at most this size in registers stores one of them while it computes the other.
constexpr double kLargestOfTwo = 176 * 128;
// What storing a larger tile takes, in terms of the sum: measured for results of 16 bits, twice that for f32.
constexpr double kTermsOfStore = 200;
// What dividing a sum takes: its parts are stored, read and added.
constexpr double kTermsOfDivision = 1000;
// A tile reads its edges and computes its area: the smaller it is, the more it waits for what it reads.
constexpr double kEdge = 8;
// cuBLASLt's order counts where the model sees no more difference than its own error.
constexpr double kError = 1.04;

double cost_of(const gpu::ProductSize& size, const gpu::ProductProposal& proposal, int multiprocessors) {
  const double waves = static_cast<double>(proposal.waves) * proposal.splits;
  if (!(waves > 0.0)) return HUGE_VAL;
  const double tiles = static_cast<double>(proposal.waves) * multiprocessors;
  const double tile = static_cast<double>(size.out) * static_cast<double>(size.rows) / tiles;
  double terms = static_cast<double>(size.in) / proposal.splits;
  if (tile > kLargestOfTwo * 1.04) terms += kTermsOfStore * (size.out_dtype == DType::f32 ? 2.0 : 1.0);
  if (proposal.splits > 1) terms += kTermsOfDivision;
  constexpr double kRounding = 1e-4;  // of waves, which are known as f32
  return std::ceil(waves - kRounding) * tile * terms * (1.0 + kEdge / std::sqrt(tile));
}

}  // namespace

std::size_t gpu::choose_proposal(const ProductSize& size, std::span<const ProductProposal> proposals,
                                 int multiprocessors) {
  double least = HUGE_VAL;
  for (const ProductProposal& p : proposals) least = std::min(least, cost_of(size, p, multiprocessors));
  for (std::size_t i = 0; i < proposals.size(); ++i)
    if (cost_of(size, proposals[i], multiprocessors) <= least * kError) return i;
  return 0;
}

}  // namespace krait::linear_detail
