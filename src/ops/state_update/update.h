// What validation hands to the paths of state_update: every tensor brought to one set of dimensions by
// views. A state (R, D, N) with G groups of channels is one of G heads of D / G channels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/state_update.h"

namespace krait::update {

struct Problem {
  Tensor state;    // (R, H, P, N)
  Tensor x;        // (B, T, H, P)
  Tensor dt;       // (B, T, H, P)
  Tensor A;        // (H, P, N)
  Tensor B;        // (B, T, G, N)
  Tensor C;        // (B, T, G, N)
  Tensor D;        // (H, P)
  Tensor z;        // (B, T, H, P)
  Tensor dt_bias;  // (H, P)
  Tensor out;      // (B, T, H, P)
  bool dt_softplus = false;
  DtLimit dt_limit;
  std::vector<std::int64_t> rows;  // the row of `state` of each batch entry; negative: a padding slot
  Tensor indices;                  // in place of `rows` on a GPU: (B), absent where entry b has row b

  std::int64_t tokens = 0;
  std::int64_t heads = 0;
  std::int64_t headdim = 0;
  std::int64_t d_state = 0;
  std::int64_t groups = 1;

  [[nodiscard]] std::int64_t batch() const { return x.size(0); }
  [[nodiscard]] std::int64_t group(std::int64_t head) const { return head / (heads / groups); }
};

// The path that `requested` means: `automatic` is simd, except where a tensor is f64 or the context asks
// for the reference.
[[nodiscard]] StateUpdatePath choose_path(StateUpdatePath requested, bool double_precision,
                                          bool prefer_reference);
// Threads worth their start for this many elements of state; `exponentials` where each has its own decay.
[[nodiscard]] int choose_threads(std::int64_t elements, bool exponentials, int available);

void run_reference(const Problem& problem, bool in_double);
void run_simd(Context& ctx, const Problem& problem);
void run_cuda(Context& ctx, const Problem& problem);

// On a GPU. True where spans of `count` elements that start at a multiple of `count` in the last dimension
// can be read in pieces of up to 16 bytes.
[[nodiscard]] bool in_pieces(const Tensor& t, int count);
// True where the state is moved 16 bytes at a time: states side by side, a power of two of such pieces.
[[nodiscard]] bool fits_vectors(const Problem& problem);

// How the kernel for large batches (cuda/stream.cu) divides what fits_vectors: blocks of kStreamThreads, so
// many of them to a multiprocessor, walk over tiles of channels of one head.
inline constexpr int kStreamThreads = 128;
[[nodiscard]] constexpr int stream_channels(bool decay_per_state) {
  return decay_per_state ? 4 : 8;
}  // of a lane
[[nodiscard]] constexpr int stream_blocks(std::size_t state_bytes, bool decay_per_state) {
  return decay_per_state && state_bytes == 2 ? 4 : 6;  // for which there are registers
}
struct StreamSizes {
  std::int64_t batch = 0;
  std::int64_t tokens = 1;
  std::int64_t heads = 0;
  std::int64_t headdim = 0;
  std::int64_t d_state = 0;
  DType state = DType::f32;
  bool decay_per_state = false;  // else one for a head
};
struct StreamPlan {
  std::int64_t tiles = 0;   // of a head
  std::int64_t items = 0;   // tiles of all heads of the batch
  std::int64_t blocks = 0;  // 0: another kernel serves the problem
};
// True where dtypes and strides are those of the kernel.
[[nodiscard]] bool fits_stream(const Problem& problem);
[[nodiscard]] StreamPlan choose_stream_plan(const StreamSizes& sizes, int multiprocessors);
[[nodiscard]] StreamPlan choose_stream_plan(const Problem& problem, int multiprocessors);
// False where nothing was done.
bool run_stream(Context& ctx, const Problem& problem);

}  // namespace krait::update
