// What validation hands to the paths of selective_scan: shapes are known to fit, dtypes to be among
// those listed, and every destination exists.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/selective_scan.h"
#include "ops/token_runs.h"

namespace krait::scan {

// A run of tokens with one recurrence: a batch row, or one packed sequence of it.
struct Row {
  std::int64_t batch = 0;
  std::int64_t begin = 0;  // the first token in memory order
  std::int64_t length = 0;
  std::int64_t state = 0;  // its index in initial_state and last_state
};

// A wanted state: the one after walk step `step` of row `row` goes to states[batch, slot], or to
// checkpoints[slot].
struct Save {
  std::int64_t row = 0;
  std::int64_t step = 0;
  std::int64_t slot = 0;
  bool checkpoint = false;
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
  Tensor checkpoints;  // (K, D, N)

  std::int64_t channels = 0;
  std::int64_t d_state = 0;
  std::int64_t groups = 1;
  std::vector<Row> rows;
  std::vector<Save> saves;  // sorted by row, then step
  TokenRuns runs;           // in place of rows, seq_idx and saves on a GPU
  bool whole_rows = true;   // neither seq_idx nor cu_seqlens

  // The token that walk step `step` of `row` visits.
  [[nodiscard]] std::int64_t token(const Row& row, std::int64_t step) const {
    return row.begin + (reverse ? row.length - 1 - step : step);
  }
};

// What the backward reads and writes beside the problem; each may be absent. dB and dC, where variable, have
// four dimensions, with one group or that of the problem.
struct Gradients {
  Tensor dout;
  Tensor dlast_state;
  Tensor checkpoints;  // (K, D, N)
  Tensor du;
  Tensor ddelta;
  Tensor dz;
  Tensor dinitial_state;
  Tensor dB;
  Tensor dC;
  Tensor dA;
  Tensor dD;
  Tensor ddelta_bias;
};

// The sequence that seq_idx gives to a walk step: 0 where there is none, -1 for padding.
[[nodiscard]] std::int64_t sequence_of(const Problem& problem, const Row& row, std::int64_t step);

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
  const Problem& problem_;
  const Row& row_;
  std::int64_t longest_;
  std::int64_t step_ = 0;
  std::int64_t sequence_ = -1;  // that of the last real token; -1: none yet
  std::span<const Save> saves_;
};

// Walk steps of one sequence (and padding between them) whose states the backward holds at one time.
struct Tile {
  std::int64_t begin = 0;
  std::int64_t length = 0;
  bool restart = false;          // the state is 0 before the first step
  bool padded = false;           // has padding
  std::int64_t checkpoint = -1;  // which one holds the state before the first step; -1: that is known
};

// Cuts each row into tiles of at most `longest` steps: where seq_idx changes, but not at padding.
[[nodiscard]] std::vector<std::vector<Tile>> cut_into_tiles(const Problem& problem, std::int64_t longest);

// How the backward shares out its work. An item is a part of the rows and some blocks of channels of one
// group. Sums over rows are kept for each part, sums over channels for each segment, so that the division
// depends on the shape alone: with the number of threads the order of the sums would change.
struct Division {
  std::int64_t block = 0;     // channels walked together
  std::int64_t blocks = 0;    // in a group
  std::int64_t deep = 0;      // blocks of a segment, the last one of a group may have fewer
  std::int64_t segments = 0;  // in a group
  std::int64_t parts = 0;     // of the rows
};
[[nodiscard]] Division divide_backward(std::int64_t rows, std::int64_t groups,
                                       std::int64_t channels_per_group);
// Steps of a tile of the backward.
[[nodiscard]] std::int64_t choose_backward_steps(std::int64_t d_state, bool complex);

// The path that `requested` means: `automatic` is simd, except where an input is f64 or c128 or the
// context asks for the reference.
[[nodiscard]] ScanPath choose_path(ScanPath requested, bool double_precision, bool prefer_reference);

// Four cache lines of f32, two of bf16: the rows of a channel-last tensor are far apart, and each visit of a
// page should bring more than one line. Narrower blocks also repeat the staging of B and C more often.
inline constexpr std::int64_t kWidestBlock = 64;
// Channels that one thread walks together: fewer where that gives every thread work.
[[nodiscard]] std::int64_t choose_channel_block(std::int64_t rows, std::int64_t groups,
                                                std::int64_t channels_per_group, int threads);
// Steps of a tile, so that the tiles of a channel block stay in the first-level cache.
[[nodiscard]] std::int64_t choose_steps(std::int64_t d_state, bool complex);

void run_reference(const Problem& problem);
void run_simd(Context& ctx, const Problem& problem);
void run_reference_backward(const Problem& problem, const Gradients& gradients);
void run_simd_backward(Context& ctx, const Problem& problem, const Gradients& gradients);

// A GPU keeps the states after each kCheckpointSteps tokens of a run, the last one apart: (K, N, D) in
// memory.
inline constexpr std::int64_t kCheckpointSteps = 32;
[[nodiscard]] std::int64_t count_checkpoints(std::int64_t run_length);
[[nodiscard]] std::int64_t count_checkpoints(const TokenRuns& runs);
// How many there are at most, one each `steps` tokens, however the rows are cut into sequences.
[[nodiscard]] std::int64_t count_most_checkpoints(std::int64_t rows, std::int64_t length, std::int64_t steps);

// How the fast kernels of a GPU share out a problem: `lanes` of a warp, a team, take `per_team` channels,
// `states` states each of every one, and a run is cut into pieces of at most `piece` tokens (in the backward:
// 0 where it is not).
struct LanePlan {
  int lanes = 0;
  int states = 0;
  int per_team = 1;        // channels that the lanes share
  int resident = 4;        // blocks that a multiprocessor holds at once (forward)
  std::int64_t piece = 0;  // a multiple of kCheckpointSteps
  bool in_turn = false;    // pieces of a row wait for one another (backward)
};
// `channel_last`: the kernel for tensors of that layout takes the problem (fits_channel_last).
[[nodiscard]] LanePlan choose_forward(std::int64_t runs, std::int64_t groups, std::int64_t channels_per_group,
                                      std::int64_t length, std::int64_t d_state, bool channel_last,
                                      int multiprocessors);
// `whole_rows`: runs are rows of `length` tokens. 0 tokens of a piece: runs stay whole.
[[nodiscard]] LanePlan choose_backward(std::int64_t runs, std::int64_t groups,
                                       std::int64_t channels_per_group, std::int64_t length, bool whole_rows,
                                       std::int64_t d_state, int multiprocessors);
// True where the backward's kernel whose warps have roles of their own is the faster one (unwind_roles.cu),
// if it takes the problem.
[[nodiscard]] bool suits_roles(const LanePlan& plan, std::int64_t channels_per_group);
// True for real states, B and C that are variable, and 1 to 256 states.
[[nodiscard]] bool fits_tiles(const Problem& problem);

void run_cuda(Context& ctx, const Problem& problem);
void run_cuda_backward(Context& ctx, const Problem& problem, const Gradients& gradients);

}  // namespace krait::scan
