// The forward's work, divided among blocks that stay on their multiprocessors: equal ranges of the chunks of
// all units, one after the other. A unit is one run of tokens and one pair of tiles (64 channels of a head
// each, of one group of heads); its chunks need the state that the ones before them leave.
//
// A block whose range ends inside a unit hands the state there on, and does that first: units that are no
// longer than a range lie in at most two blocks, and their first part is simply computed before all else; of
// longer ones the blocks first walk their chunks for the state alone, from 0 where the part is not the unit's
// first. What begins inside a unit comes last. So states are there when they are asked for, and a block waits
// only for blocks before it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define KRAIT_HOST_DEVICE __host__ __device__
#else
#define KRAIT_HOST_DEVICE
#endif

namespace krait::ssd_detail {

struct Division {
  int total = 0;  // chunks of all units
  int pairs = 0;  // of a run
  int runs = 0;
  int blocks = 1;

  [[nodiscard]] KRAIT_HOST_DEVICE int begin_of(int block) const {
    return static_cast<int>(std::int64_t{total} * block / blocks);
  }
  [[nodiscard]] KRAIT_HOST_DEVICE int block_of(int chunk) const {
    return static_cast<int>(((std::int64_t{chunk} + 1) * blocks - 1) / total);
  }
};

// Chunks [begin, begin + count) of a unit.
struct Part {
  int run = 0;
  int pair = 0;
  int begin = 0;
  int count = 0;
  int first_block = 0;  // where `waits`: the blocks from this one on have the unit's chunks before
  bool outputs = true;  // false: for the state alone
  bool waits = false;   // starts from the state that others hand on
  bool publishes = false;
};

// What a block does, in order. `first(run)`: the chunks of the runs before it.
template <typename First>
class Parts {
 public:
  KRAIT_HOST_DEVICE Parts(const Division& division, const First& first, int block)
      : division_(division),
        first_(first),
        begin_(division.begin_of(block)),
        next_(begin_),
        end_(division.begin_of(block + 1)),
        stop_(end_) {}

  // Of a part for the state alone, before it is asked for: so many chunks at its beginning, fewer than it
  // has, leave nothing in the state at its end and are left out.
  KRAIT_HOST_DEVICE void skip(int chunks) { skipped_ = chunks; }

  KRAIT_HOST_DEVICE bool next(Part& part) {
    if (begin_ == end_) return false;
    if (step_ == 0) {
      step_ = 1;
      const Unit first = unit_at(begin_);
      if (first.begin < begin_) next_ = first.end < end_ ? first.end : end_;
      const Unit last = unit_at(end_ - 1);
      if (end_ < last.end) {
        part = of(last, last.begin > begin_ ? last.begin : begin_, end_);
        part.publishes = true;
        part.outputs = last.end - last.begin <= division_.total / division_.blocks;
        if (part.outputs) {
          stop_ = last.begin;
        } else {
          part.begin += skipped_;
          part.count -= skipped_;
        }
        return true;
      }
    }
    if (next_ < stop_) {
      const Unit unit = unit_at(next_);
      const int end = unit.end < stop_ ? unit.end : stop_;
      part = of(unit, next_, end);
      next_ = end;
      return true;
    }
    if (step_ == 1) {
      step_ = 2;
      const Unit first = unit_at(begin_);
      if (first.begin < begin_) {
        part = of(first, begin_, first.end < end_ ? first.end : end_);
        part.waits = true;
        part.first_block = division_.block_of(first.begin);
        return true;
      }
    }
    return false;
  }

 private:
  struct Unit {
    int run, pair, begin, end;
  };
  KRAIT_HOST_DEVICE Unit unit_at(int chunk) const {
    int run = 0;
    for (int above = division_.runs; above - run > 1;) {
      const int middle = (run + above) / 2;
      (first_(middle) * division_.pairs <= chunk ? run : above) = middle;
    }
    const int of_runs = first_(run);
    const int count = first_(run + 1) - of_runs;
    const int pair = (chunk - of_runs * division_.pairs) / count;
    const int begin = of_runs * division_.pairs + pair * count;
    return {run, pair, begin, begin + count};
  }
  static KRAIT_HOST_DEVICE Part of(const Unit& unit, int begin, int end) {
    Part part;
    part.run = unit.run;
    part.pair = unit.pair;
    part.begin = begin - unit.begin;
    part.count = end - begin;
    return part;
  }

  Division division_;
  First first_;
  int begin_;
  int next_;  // of the units that are walked from their beginning
  int end_;
  int stop_;
  int step_ = 0;
  int skipped_ = 0;
};

}  // namespace krait::ssd_detail
