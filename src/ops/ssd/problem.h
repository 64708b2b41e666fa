// What the entry points of ssd hand to its paths: shapes fit, dtypes are allowed, every destination exists.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/ssd.h"
#include "ops/token_runs.h"

namespace krait::ssd_detail {

struct Problem {
  Tensor x;               // (B, L, H, P)
  Tensor dt;              // (B, L, H); the exponent of the decay itself where `discrete`
  Tensor A;               // (H); absent where `discrete`
  Tensor B;               // (B, L, G, N)
  Tensor C;               // (B, L, G, N)
  Tensor D;               // (H, P) or absent
  Tensor z;               // (B, L, H, P) or absent
  Tensor dt_bias;         // (H) or absent
  Tensor initial_states;  // (sequences, H, P, N) or absent
  bool dt_softplus = false;
  bool discrete = false;  // x and A were multiplied by d already
  DtLimit dt_limit;
  std::int64_t chunk_size = 0;  // of the chunked path, 1 to kMaxChunk
  Tensor out;                   // (B, L, H, P), x's dtype; places of padding tokens are left alone
  Tensor final_states;          // (sequences, H, P, N), f32 or f64, or absent
  Tensor states;                // (B, M, H, P, N), f32 or f64, or absent
  const TokenRuns* runs = nullptr;

  [[nodiscard]] std::int64_t heads() const { return x.size(2); }
  [[nodiscard]] std::int64_t headdim() const { return x.size(3); }
  [[nodiscard]] std::int64_t d_state() const { return B.size(3); }
  [[nodiscard]] std::int64_t groups() const { return B.size(2); }
  [[nodiscard]] std::int64_t heads_per_group() const { return groups() > 0 ? heads() / groups() : 0; }
};

// A larger chunk costs more than it saves, and its masked matrix leaves the second-level cache.
inline constexpr std::int64_t kMaxChunk = 256;

void run_reference(Context& ctx, const Problem& problem);
// A, D and dt_bias are contiguous f32.
void run_recurrent(Context& ctx, const Problem& problem);
void run_chunked(Context& ctx, const Problem& problem);

// Makes missing destinations, cuts the batch into runs, takes the path and reports it. `problem` holds the
// inputs, and the destinations that the caller gave.
struct Wanted {
  Tensor seq_idx;
  Tensor cu_seqlens;
  Tensor state_positions;
  bool reverse = false;
  bool final_states = false;
  std::int64_t chunk_size = 0;
  SsdPath path = SsdPath::automatic;
};
SsdResult run(Context& ctx, std::string_view op, Problem problem, const Wanted& wanted);

// Heads of one group that a thread takes together, so that they share C B^T.
[[nodiscard]] std::int64_t choose_heads_per_block(std::int64_t independent, std::int64_t heads_per_group,
                                                  std::int64_t state_size, std::int64_t threads);

// The next token count, at most `limit` after `done`, at which the state is wanted or the run ends.
// `request` is the first request that lies behind `done`.
[[nodiscard]] inline std::int64_t next_stop(const TokenRuns& runs, const TokenRun& run, std::int64_t done,
                                            std::int64_t limit, std::size_t request) {
  std::int64_t stop = std::min(done + limit, run.count);
  if (request < run.requests_end) stop = std::min(stop, runs.requests[request].count);
  return stop;
}

// Calls save(tensor (P, N)) for each state of `head` that is wanted after `done` tokens; moves `request` on.
template <typename Save>
void save_states(const Problem& p, const TokenRun& run, std::int64_t done, std::int64_t head,
                 std::size_t& request, const Save& save) {
  for (; request < run.requests_end && p.runs->requests[request].count == done; ++request) {
    const StateRequest& wanted = p.runs->requests[request];
    save(p.states.select(0, wanted.row).select(0, wanted.slot).select(0, head));
  }
  if (done == run.count && run.last && p.final_states)
    save(p.final_states.select(0, run.sequence).select(0, head));
}

}  // namespace krait::ssd_detail
