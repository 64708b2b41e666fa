// Which tokens follow one another: the bookkeeping of seq_idx, cu_seqlens, reverse and state_positions,
// done once before the kernels of a recurrent operator start. A kernel then walks runs: tokens that share
// one state, with nothing between them that it would have to test.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "krait/core/error.h"
#include "krait/core/tensor.h"
#include "ops/overlap.h"

namespace krait {

// Tokens of one sequence in the order of processing. Padding tokens (seq_idx < 0) are not part of it.
struct TokenRun {
  std::int64_t row = 0;            // of the batch
  std::int64_t sequence = 0;       // batch row, or packed sequence: whose initial and final states
  bool first = false;              // starts from the sequence's initial state, else from 0
  bool last = false;               // ends in the sequence's final state
  std::int64_t count = 0;          // of tokens; 0 in a sequence without any (which then is first and last)
  std::int64_t start = 0;          // position of the first token
  std::int64_t step = 1;           // from one to the next: 1 or -1
  std::int64_t listed = -1;        // >= 0: positions are TokenRuns::positions[listed + i] instead
  std::size_t requests_begin = 0;  // into TokenRuns::requests
  std::size_t requests_end = 0;
};

// The state after `count` tokens of `run` is wanted as states[row, slot].
struct StateRequest {
  std::int64_t run = 0;
  std::int64_t count = 0;
  std::int64_t row = 0;
  std::int64_t slot = 0;
};

struct TokenRuns {
  struct Token {
    std::int64_t row;
    std::int64_t position;
  };
  std::vector<TokenRun> runs;
  std::vector<std::int64_t> positions;
  std::vector<StateRequest> requests;  // sorted by run, then count
  std::vector<Token> padding;          // their output is 0
  std::int64_t sequences = 0;

  [[nodiscard]] std::int64_t position(const TokenRun& run, std::int64_t i) const {
    return run.listed < 0 ? run.start + i * run.step : positions[static_cast<std::size_t>(run.listed + i)];
  }
};

// Element i of a one-dimensional tensor of i32 or i64.
[[nodiscard]] inline std::int64_t index_at(const Tensor& t, std::int64_t i) {
  return t.dtype() == DType::i32 ? std::int64_t{t.data<std::int32_t>()[i * t.stride(0)]}
                                 : t.data<std::int64_t>()[i * t.stride(0)];
}

inline void require_index_dtype(std::string_view op, std::string_view name, const Tensor& t) {
  require(t.dtype() == DType::i32 || t.dtype() == DType::i64, "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected i32 or i64");
}

// Validates the three tensors (each may be absent) against a batch of `rows` rows of `length` tokens.
inline void validate_sequences(std::string_view op, std::int64_t rows, std::int64_t length,
                               const Tensor& seq_idx, const Tensor& cu_seqlens,
                               const Tensor& state_positions) {
  if (seq_idx) {
    require_index_dtype(op, "seq_idx", seq_idx);
    require(seq_idx.shape() == Dims{rows, length}, "[", op, "] seq_idx has shape ", seq_idx.shape(),
            ", expected ", Dims{rows, length});
  }
  if (cu_seqlens) {
    require_index_dtype(op, "cu_seqlens", cu_seqlens);
    require(cu_seqlens.ndim() == 1 && cu_seqlens.size(0) >= 1, "[", op, "] cu_seqlens has shape ",
            cu_seqlens.shape(), ", expected (n + 1)");
    require(rows == 1, "[", op, "] cu_seqlens needs a batch of 1, found ", rows);
    const std::int64_t n = cu_seqlens.size(0) - 1;
    require(index_at(cu_seqlens, 0) == 0, "[", op, "] cu_seqlens starts with ", index_at(cu_seqlens, 0),
            ", expected 0");
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t from = index_at(cu_seqlens, i);
      const std::int64_t to = index_at(cu_seqlens, i + 1);
      require(from <= to, "[", op, "] cu_seqlens decreases from ", from, " to ", to, " at ", i + 1);
    }
    require(index_at(cu_seqlens, n) == length, "[", op, "] cu_seqlens ends with ", index_at(cu_seqlens, n),
            ", expected ", length, " tokens");
  }
  if (state_positions) {
    require_index_dtype(op, "state_positions", state_positions);
    require(state_positions.ndim() == 2 && state_positions.size(0) == rows, "[", op,
            "] state_positions has shape ", state_positions.shape(), ", expected (", rows, ", M)");
    for (std::int64_t b = 0; b < rows; ++b) {
      const Tensor row = state_positions.select(0, b);
      for (std::int64_t m = 0; m < row.size(0); ++m)
        require(index_at(row, m) >= 0 && index_at(row, m) < length, "[", op, "] state_positions[", b, ", ", m,
                "] is ", index_at(row, m), ", expected 0 to ", length - 1);
    }
  }
}

// Cuts a batch into runs. The tensors are valid.
inline TokenRuns cut_into_runs(std::int64_t rows, std::int64_t length, const Tensor& seq_idx,
                               const Tensor& cu_seqlens, const Tensor& state_positions, bool reverse) {
  TokenRuns result;
  result.sequences = cu_seqlens ? cu_seqlens.size(0) - 1 : rows;
  struct Place {
    std::int64_t run;
    std::int64_t count;
  };
  std::vector<Place> places(state_positions ? static_cast<std::size_t>(length) : 0);  // of one row

  for (std::int64_t s = 0; s < result.sequences; ++s) {
    const std::int64_t row = cu_seqlens ? 0 : s;
    const std::int64_t begin = cu_seqlens ? index_at(cu_seqlens, s) : 0;
    const std::int64_t end = cu_seqlens ? index_at(cu_seqlens, s + 1) : length;
    const std::int64_t step = reverse ? -1 : 1;
    const auto position_of = [&](std::int64_t i) { return reverse ? end - 1 - i : begin + i; };
    result.runs.push_back({.row = row, .sequence = s, .first = true, .start = position_of(0), .step = step});

    if (!seq_idx) {
      result.runs.back().count = end - begin;
    } else {
      const Tensor ids = seq_idx.select(0, row);
      std::int64_t current = -1;  // of the run being built; -1: no token yet
      for (std::int64_t i = 0; i < end - begin; ++i) {
        const std::int64_t t = position_of(i);
        const std::int64_t id = index_at(ids, t);
        if (id < 0) {
          result.padding.push_back({row, t});
        } else {
          if (current >= 0 && id != current)
            result.runs.push_back({.row = row, .sequence = s, .start = t, .step = step});
          current = id;
          TokenRun& run = result.runs.back();
          if (run.count == 0) run.start = t;
          if (run.listed < 0 && t != run.start + run.count * step) {
            // Padding lies inside: from here on the positions are listed.
            run.listed = static_cast<std::int64_t>(result.positions.size());
            for (std::int64_t j = 0; j < run.count; ++j) result.positions.push_back(run.start + j * step);
          }
          if (run.listed >= 0) result.positions.push_back(t);
          ++run.count;
        }
        if (state_positions)
          places[static_cast<std::size_t>(t)] = {static_cast<std::int64_t>(result.runs.size()) - 1,
                                                 result.runs.back().count};
      }
    }
    result.runs.back().last = true;
    if (state_positions && !seq_idx) {
      for (std::int64_t i = 0; i < end - begin; ++i)
        places[static_cast<std::size_t>(position_of(i))] = {static_cast<std::int64_t>(result.runs.size()) - 1,
                                                            i + 1};
    }
    if (state_positions && s + 1 == (cu_seqlens ? result.sequences : s + 1)) {
      const Tensor wanted = state_positions.select(0, row);
      for (std::int64_t m = 0; m < wanted.size(0); ++m) {
        const Place place = places[static_cast<std::size_t>(index_at(wanted, m))];
        result.requests.push_back({.run = place.run, .count = place.count, .row = row, .slot = m});
      }
    }
  }

  std::sort(result.requests.begin(), result.requests.end(), [](const StateRequest& a, const StateRequest& b) {
    if (a.run != b.run) return a.run < b.run;
    return a.count != b.count ? a.count < b.count : a.slot < b.slot;
  });
  std::size_t at = 0;
  for (std::size_t r = 0; r < result.runs.size(); ++r) {
    result.runs[r].requests_begin = at;
    while (at < result.requests.size() && result.requests[at].run == static_cast<std::int64_t>(r)) ++at;
    result.runs[r].requests_end = at;
  }
  return result;
}

}  // namespace krait
