// Runs cut into segments, which blocks of a kernel work on side by side.
#pragma once

#include <cstdint>

#include "core/cuda/gpu.h"
#include "krait/core/context.h"
#include "ops/token_runs.h"

namespace krait::ssd_detail {

// Consecutive tokens of one run.
struct Segment {
  std::int64_t run = 0;
  std::int64_t begin = 0;  // tokens of the run before it
  std::int64_t row = 0;
  std::int64_t sequence = 0;
  std::int64_t start = 0;  // position of the first token
  std::int64_t step = 1;
  std::int64_t listed = -1;  // >= 0: positions are Segments::positions[listed + i] instead
  std::int64_t count = 0;    // of tokens; 0 only in a run without any
  std::int64_t requests_begin = 0;
  std::int64_t requests_end = 0;
  bool run_begins = false;
  bool run_ends = false;
  bool initial = false;  // starts from the sequence's initial state
  bool final = false;    // ends in the sequence's final state
};

// For kernels, by value. Whole rows need no lists: `listed` and `first_of_run` are null then.
struct Segments {
  std::int64_t count = 0;
  std::int64_t runs = 0;
  std::int64_t tokens = 1;   // of a full segment
  std::int64_t per_run = 1;  // where rows are whole, and at most in a run
  std::int64_t length = 0;   // of a whole row
  bool reverse = false;
  const Segment* listed = nullptr;
  const StateRequest* requests = nullptr;  // `run` is the segment, `count` counts its tokens
  const std::int64_t* positions = nullptr;
  const std::int64_t* first_of_run = nullptr;  // [runs + 1]
  const TokenRuns::Token* padding = nullptr;
  std::int64_t padding_count = 0;

#if defined(__CUDACC__) || defined(__HIPCC__)
  __device__ Segment at(std::int64_t s) const {
    return listed != nullptr ? listed[s] : of_run(s / per_run, s % per_run);
  }
  // Segment i of a run, without a division.
  __device__ Segment of_run(std::int64_t run, std::int64_t i) const {
    if (listed != nullptr) return listed[first(run) + i];
    const std::int64_t begin = i * tokens;
    const std::int64_t rest = length - begin;
    Segment result;
    result.run = result.row = result.sequence = run;
    result.begin = begin;
    result.start = reverse ? length - 1 - begin : begin;
    result.step = reverse ? -1 : 1;
    result.count = rest < tokens ? rest : tokens;
    result.run_begins = result.initial = begin == 0;
    result.run_ends = result.final = rest <= tokens;
    return result;
  }
  __device__ std::int64_t first(std::int64_t run) const {
    return first_of_run != nullptr ? first_of_run[run] : run * per_run;
  }
  __device__ std::int64_t position(const Segment& segment, std::int64_t i) const {
    return segment.listed < 0 ? segment.start + i * segment.step : positions[segment.listed + i];
  }
#endif
};

// Segments of at most `tokens` tokens; every run has at least one. `memory` is what the pointers of the
// result point into. `length`: tokens of a row.
[[nodiscard]] Segments cut_into_segments(Context& ctx, const TokenRuns& runs, std::int64_t length,
                                         std::int64_t tokens, Tensor& memory);

}  // namespace krait::ssd_detail
