// The tree of sequences that begin alike: a node is a run of tokens that all sequences below it have in
// common, so that a model runs it once.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace krait {

struct PrefixNode {
  std::int64_t parent = -1;  // a node in front of this one; -1: begins with the sequence
  std::int64_t begin = 0;    // tokens [begin, end) of each of `members`, which have [0, begin) in common too
  std::int64_t end = 0;
  std::vector<std::int64_t> members;
};

// Every token of every sequence is in exactly one node that the sequence is a member of. Beginnings are
// shared where they save at least `least_shared` tokens of each sequence but one, and a quarter of what is
// left of them on average, through at most `max_depth` nodes above a last one: words that many questions
// begin with do not take the place of what the choices of one question have in common. With max_depth 0 only
// sequences that are equal share.
std::vector<PrefixNode> prefix_tree(std::span<const std::span<const std::int64_t>> sequences,
                                    std::int64_t least_shared, int max_depth);

}  // namespace krait
