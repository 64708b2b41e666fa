#include <algorithm>

#include "ops/selective_scan/scan.h"

namespace krait::scan {

Walk::Walk(const Problem& problem, std::int64_t row, std::int64_t longest)
    : problem_(problem), row_(problem.rows[static_cast<std::size_t>(row)]), longest_(longest) {
  const auto by_row = [](const Save& a, const Save& b) { return a.row < b.row; };
  const auto [first, last] =
      std::equal_range(problem.saves.begin(), problem.saves.end(), Save{.row = row}, by_row);
  saves_ = std::span<const Save>(first, last);
}

std::int64_t Walk::sequence_of(std::int64_t step) const {
  const Tensor& ids = problem_.seq_idx;
  if (!ids) return 0;
  const std::int64_t at = row_.batch * ids.stride(0) + problem_.token(row_, step) * ids.stride(1);
  const std::int64_t id = ids.dtype() == DType::i32
                              ? std::int64_t{static_cast<const std::int32_t*>(ids.raw())[at]}
                              : static_cast<const std::int64_t*>(ids.raw())[at];
  return std::max<std::int64_t>(id, -1);
}

bool Walk::next(Span& span) {
  if (step_ == row_.length) return false;
  const std::int64_t sequence = sequence_of(step_);
  span.begin = step_;
  span.padding = sequence < 0;
  span.restart = !span.padding && sequence_ >= 0 && sequence != sequence_;
  if (!span.padding) sequence_ = sequence;

  std::int64_t limit = std::min(row_.length, step_ + longest_);
  if (!saves_.empty()) limit = std::min(limit, saves_.front().step + 1);
  ++step_;
  if (problem_.seq_idx) {
    while (step_ < limit && sequence_of(step_) == sequence) ++step_;
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

}  // namespace krait::scan
