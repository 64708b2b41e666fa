#include "eval/prefix_tree.h"

#include <algorithm>
#include <numeric>

namespace krait {
namespace {

std::int64_t common_length(std::span<const std::int64_t> a, std::span<const std::int64_t> b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

// Sequences [first, last) of the sorted ones, whose tokens before `begin` are in nodes already.
struct Range {
  std::size_t first;
  std::size_t last;
  std::int64_t begin;
  std::int64_t parent;
  int depth;
};

}  // namespace

std::vector<PrefixNode> prefix_tree(std::span<const std::span<const std::int64_t>> sequences,
                                    std::int64_t least_shared, int max_depth) {
  // Once sorted, sequences that begin alike are neighbours, and what a range has in common is the least that
  // two neighbours in it have.
  std::vector<std::int64_t> order(sequences.size());
  std::iota(order.begin(), order.end(), 0);
  const auto sequence = [&](std::size_t i) { return sequences[static_cast<std::size_t>(order[i])]; };
  std::ranges::stable_sort(order, [&](std::int64_t a, std::int64_t b) {
    return std::ranges::lexicographical_compare(sequences[static_cast<std::size_t>(a)],
                                                sequences[static_cast<std::size_t>(b)]);
  });
  std::vector<std::int64_t> common(sequences.size(), 0);  // of each and the one before it
  for (std::size_t i = 1; i < common.size(); ++i) common[i] = common_length(sequence(i - 1), sequence(i));

  std::vector<PrefixNode> nodes;
  const auto add_node = [&](const Range& range, std::int64_t end) {
    nodes.push_back({.parent = range.parent,
                     .begin = range.begin,
                     .end = end,
                     .members = {order.begin() + static_cast<std::ptrdiff_t>(range.first),
                                 order.begin() + static_cast<std::ptrdiff_t>(range.last)}});
  };
  std::vector<Range> pending;
  if (!sequences.empty())
    pending.push_back({.first = 0, .last = sequences.size(), .begin = 0, .parent = -1, .depth = 0});
  while (!pending.empty()) {
    Range range = pending.back();
    pending.pop_back();
    std::int64_t shared = std::ssize(sequence(range.first));
    for (std::size_t i = range.first + 1; i < range.last; ++i) shared = std::min(shared, common[i]);
    if (shared == std::ssize(sequence(range.last - 1))) {  // all are equal
      if (shared > range.begin) add_node(range, shared);
      continue;
    }
    std::int64_t left = 0;
    for (std::size_t i = range.first; i < range.last; ++i) left += std::ssize(sequence(i)) - range.begin;
    const auto count = static_cast<std::int64_t>(range.last - range.first);
    const bool is_quarter = 4 * (shared - range.begin) * count >= left;
    if (range.depth < max_depth && shared - range.begin >= least_shared && is_quarter) {
      add_node(range, shared);
      range.begin = shared;
      range.parent = std::ssize(nodes) - 1;
      ++range.depth;
    }
    // Parts that go on differently. Last ones first, so that nodes are made in the order of the sequences.
    std::size_t last = range.last;
    for (std::size_t i = range.last - 1;; --i) {
      if (i > range.first && common[i] != shared) continue;
      pending.push_back(
          {.first = i, .last = last, .begin = range.begin, .parent = range.parent, .depth = range.depth});
      last = i;
      if (i == range.first) break;
    }
  }
  return nodes;
}

}  // namespace krait
