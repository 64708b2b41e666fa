#include <algorithm>

#include "ops/selective_scan/scan.h"

namespace krait::scan {

std::int64_t sequence_of(const Problem& problem, const Row& row, std::int64_t step) {
  const Tensor& ids = problem.seq_idx;
  if (!ids) return 0;
  const std::int64_t at = row.batch * ids.stride(0) + problem.token(row, step) * ids.stride(1);
  const std::int64_t id = ids.dtype() == DType::i32
                              ? std::int64_t{static_cast<const std::int32_t*>(ids.raw())[at]}
                              : static_cast<const std::int64_t*>(ids.raw())[at];
  return std::max<std::int64_t>(id, -1);
}

Walk::Walk(const Problem& problem, std::int64_t row, std::int64_t longest)
    : problem_(problem), row_(problem.rows[static_cast<std::size_t>(row)]), longest_(longest) {
  const auto by_row = [](const Save& a, const Save& b) { return a.row < b.row; };
  const auto [first, last] =
      std::equal_range(problem.saves.begin(), problem.saves.end(), Save{.row = row}, by_row);
  saves_ = std::span<const Save>(first, last);
}

bool Walk::next(Span& span) {
  if (step_ == row_.length) return false;
  const std::int64_t sequence = sequence_of(problem_, row_, step_);
  span.begin = step_;
  span.padding = sequence < 0;
  span.restart = !span.padding && sequence_ >= 0 && sequence != sequence_;
  if (!span.padding) sequence_ = sequence;

  std::int64_t limit = std::min(row_.length, step_ + longest_);
  if (!saves_.empty()) limit = std::min(limit, saves_.front().step + 1);
  ++step_;
  if (problem_.seq_idx) {
    while (step_ < limit && sequence_of(problem_, row_, step_) == sequence) ++step_;
  } else {
    step_ = limit;
  }
  span.length = step_ - span.begin;

  std::size_t wanted = 0;
  while (wanted < saves_.size() && saves_[wanted].step == step_ - 1) ++wanted;
  span.saves = saves_.first(wanted);
  saves_ = saves_.subspan(wanted);
  return true;
}

std::vector<std::vector<Tile>> cut_into_tiles(const Problem& problem, std::int64_t longest) {
  std::vector<std::vector<Tile>> all;
  std::int64_t checkpoints = 0;
  for (const Row& row : problem.rows) {
    std::vector<Tile>& tiles = all.emplace_back();
    std::int64_t sequence = -1;  // that of the last real token
    for (std::int64_t step = 0; step < row.length; ++step) {
      const std::int64_t here = sequence_of(problem, row, step);
      const bool restart = here >= 0 && sequence >= 0 && here != sequence;
      if (here >= 0) sequence = here;
      if (restart || tiles.empty() || tiles.back().length == longest)
        tiles.push_back(
            {.begin = step, .restart = restart, .checkpoint = restart || tiles.empty() ? -1 : checkpoints++});
      ++tiles.back().length;
      tiles.back().padded |= here < 0;
    }
  }
  return all;
}

}  // namespace krait::scan
