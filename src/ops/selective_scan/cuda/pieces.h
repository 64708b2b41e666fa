// What the GPU's kernels of selective_scan walk: runs of tokens, cut into pieces of at most `length` tokens.
#pragma once

#include <cstdint>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "ops/selective_scan/scan.h"
#include "ops/token_runs.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define KRAIT_HOST_DEVICE __host__ __device__
#else
#define KRAIT_HOST_DEVICE
#endif

namespace krait::scan {

struct Piece {
  std::int64_t row = 0;
  std::int64_t sequence = 0;
  std::int64_t start = 0;
  std::int64_t step = 1;
  std::int64_t listed = -1;  // as in TokenRun
  std::int64_t count = 0;
  std::int64_t part = 0;        // 0: the first piece of its run
  std::int64_t checkpoint = 0;  // which one holds the state after its first kCheckpointSteps tokens
  std::int64_t requests_begin = 0;
  std::int64_t requests_end = 0;
  bool first = false;       // starts from the initial state of the sequence
  bool last = false;        // ends in its final state
  bool last_of_run = true;  // no piece carries its state on

  // The state after token i is a checkpoint where i is a multiple of kCheckpointSteps, but not the last of
  // the run.
  [[nodiscard]] KRAIT_HOST_DEVICE bool has_checkpoint_after(std::int64_t tokens) const {
    return tokens % kCheckpointSteps == 0 && tokens > 0 && (tokens < count || !last_of_run);
  }
};

// Whole rows need no list: piece i is computed then.
struct Pieces {
  const Piece* list = nullptr;
  std::int64_t count = 0;
  std::int64_t parts = 1;   // of each row, without a list
  std::int64_t length = 0;  // tokens of a piece, the last one of a run may have fewer
  std::int64_t tokens = 0;  // of a row, without a list
  bool reverse = false;
  const std::int64_t* positions = nullptr;
  const StateRequest* requests = nullptr;  // counts are those of a piece

  [[nodiscard]] KRAIT_HOST_DEVICE Piece at(std::int64_t i) const {
    if (list != nullptr) return list[i];
    Piece p;
    p.row = p.sequence = i / parts;
    p.part = i % parts;
    const std::int64_t from = p.part * length;
    p.count = tokens - from < length ? tokens - from : length;
    p.start = reverse ? tokens - 1 - from : from;
    p.step = reverse ? -1 : 1;
    p.first = p.part == 0;
    p.last = p.last_of_run = p.part + 1 == parts;
    p.checkpoint = tokens == 0 ? 0 : p.row * ((tokens - 1) / kCheckpointSteps) + from / kCheckpointSteps;
    return p;
  }
  [[nodiscard]] KRAIT_HOST_DEVICE std::int64_t position(const Piece& p, std::int64_t i) const {
    return p.listed < 0 ? p.start + i * p.step : positions[p.listed + i];
  }
};

// Pieces in the memory of the GPU; `memory` owns what they point into.
struct UploadedPieces {
  Pieces pieces;
  Tensor memory;
};
UploadedPieces upload_pieces(Context& ctx, const Problem& problem, std::int64_t length);

}  // namespace krait::scan
