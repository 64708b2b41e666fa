// What validation hands to the paths of selective_scan: shapes are known to fit, dtypes to be among
// those listed, and every destination exists.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/selective_scan.h"

namespace krait::scan {

// A run of tokens with one recurrence: a batch row, or one packed sequence of it.
struct Row {
  std::int64_t batch = 0;
  std::int64_t begin = 0;  // the first token in memory order
  std::int64_t length = 0;
  std::int64_t state = 0;  // its index in initial_state and last_state
};

// A wanted state: the one after walk step `step` of row `row` goes to states[batch, slot].
struct Save {
  std::int64_t row = 0;
  std::int64_t step = 0;
  std::int64_t slot = 0;
};

struct Problem {
  Tensor u;
  Tensor delta;
  Tensor A;
  Tensor B;  // (D, N), or (B, G, N, L) with the common G; last size 2L where A is complex
  Tensor C;
  Tensor D;
  Tensor z;
  Tensor delta_bias;
  Tensor initial_state;
  Tensor seq_idx;
  bool delta_softplus = false;
  bool reverse = false;
  bool complex = false;
  Tensor out;
  Tensor last_state;
  Tensor states;

  std::int64_t channels = 0;
  std::int64_t d_state = 0;
  std::int64_t groups = 1;
  std::vector<Row> rows;
  std::vector<Save> saves;  // sorted by row, then step

  // The token that walk step `step` of `row` visits.
  [[nodiscard]] std::int64_t token(const Row& row, std::int64_t step) const {
    return row.begin + (reverse ? row.length - 1 - step : step);
  }
};

// Consecutive walk steps of a row that are treated alike.
struct Span {
  std::int64_t begin = 0;
  std::int64_t length = 0;
  bool restart = false;         // the state is 0 before the first step
  bool padding = false;         // tokens outside of any sequence: outputs are 0, the state stays
  std::span<const Save> saves;  // states wanted after the last step
};

// Cuts a row into spans of at most `longest` steps: where seq_idx changes or becomes padding, and after
// each step whose state is wanted.
class Walk {
 public:
  Walk(const Problem& problem, std::int64_t row, std::int64_t longest);
  // False at the end of the row.
  bool next(Span& span);

 private:
  [[nodiscard]] std::int64_t sequence_of(std::int64_t step) const;

  const Problem& problem_;
  const Row& row_;
  std::int64_t longest_;
  std::int64_t step_ = 0;
  std::int64_t sequence_ = -1;  // that of the last real token; -1: none yet
  std::span<const Save> saves_;
};

// The path that `requested` means: `automatic` is simd, except where an input is f64 or c128 or the
// context asks for the reference.
[[nodiscard]] ScanPath choose_path(ScanPath requested, bool double_precision, bool prefer_reference);

// Channels that one thread walks together: fewer where that gives every thread work.
[[nodiscard]] std::int64_t choose_channel_block(std::int64_t rows, std::int64_t groups,
                                                std::int64_t channels_per_group, int threads);
// Steps of a tile, so that the tiles of a channel block stay in the first-level cache.
[[nodiscard]] std::int64_t choose_steps(std::int64_t d_state, bool complex);

void run_reference(const Problem& problem);
void run_simd(Context& ctx, const Problem& problem);

}  // namespace krait::scan
