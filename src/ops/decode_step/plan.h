// How decode_step divides a model among the multiprocessors, as a function of sizes alone.
#pragma once

#include <cstdint>

#include "krait/ops/decode_step.h"

namespace krait::decode_detail {

inline constexpr int kWarps = 8;  // that compute; one more brings the weights
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kStep = 32;         // columns that a warp multiplies at a time
inline constexpr int kMostModel = 4096;  // d_model and d_inner: a warp keeps its
                                         // eighth of a vector in registers
inline constexpr int kMostInner = 8192;
inline constexpr int kQuadColumns = kWarps * 32 * 4;  // that four columns a thread cover
inline constexpr int kMostBlocks = 256;
inline constexpr int kMostGroups = 8;
inline constexpr int kMostRows = 128;  // of a product between two barriers
inline constexpr int kTileRows = 32;   // at most
// Of models whose sizes kernels know: d_state and headdim of Mamba-2; d_state of Mamba-1, and its dt_rank for
// each step along d_model.
inline constexpr int kKnownStates = 128;
inline constexpr int kKnownHeaddim = 64;
inline constexpr int kKnownLowStates = 16;
inline constexpr int kKnownRankOfStep = 16;
inline constexpr int kMostStates = 256;  // of a channel
inline constexpr int kTileBytes = 48 * 1024;
// 96 KB on their way to each multiprocessor keep an H200's memory busy.
inline constexpr int kPieceShift = 14;
inline constexpr int kInFlight = 6;
inline constexpr int kMostDtPieces = 8;       // 16 bytes of a row of dt_proj that a lane holds
inline constexpr int kMostLow = 1024;         // rows of x_proj
inline constexpr int kDeclaredShared = 8192;  // what the kernel declares itself, and a reserve

struct DecodePlan {
  int blocks = 0;       // one for each multiprocessor; 0: not for this kernel
  int model_tile = 0;   // rows, a power of two, of a matrix with d_model columns
                        // that are brought at a time
  int inner_tile = 0;   // of one with d_inner columns
  int state_tile = 0;   // channels whose states are (Mamba-2)
  int ring = 0;         // bytes of shared memory that weights pass through
  int piece_shift = 0;  // log2 of the bytes that are copied there at once
  int in_flight = 0;    // such copies on their way at a time
  int shared = 0;       // bytes, with all else
};

[[nodiscard]] std::int64_t in_rows(const DecodeSizes& sizes);
[[nodiscard]] std::int64_t conv_channels(const DecodeSizes& sizes);
// Words of 8 bytes that carry results between blocks, two values each: of one vector, which begins at a
// multiple of 16 bytes, and of all.
[[nodiscard]] constexpr std::int64_t words_for(std::int64_t values) { return (values + 3) / 4 * 2; }
[[nodiscard]] std::int64_t word_count(const DecodeSizes& sizes);
// Steps of a warp along `columns`; eight warps cover them, the last ones maybe beyond the end.
[[nodiscard]] constexpr int steps_of(std::int64_t columns) {
  return static_cast<int>((columns + kWarps * kStep - 1) / (kWarps * kStep));
}

// Rows, a power of two, of a matrix of 16-bit weights that are brought at a time.
[[nodiscard]] constexpr int tile_rows(std::int64_t columns) {
  int rows = kTileRows;
  while (rows * columns * 2 > kTileBytes) rows /= 2;
  return rows;
}

[[nodiscard]] DecodePlan choose_decode_plan(const DecodeSizes& sizes, int most_layers, int multiprocessors,
                                            std::int64_t shared_memory);

// What block `block` of `blocks` has of `count` rows: an even number of them, but for the last row.
struct Share {
  int first = 0;
  int count = 0;
};
#if defined(__CUDACC__) || defined(__HIPCC__)
__host__ __device__
#endif
    constexpr Share
    share_of(int count, int block, int blocks) {
  // 2^23 pairs of a vocabulary times 2^8 blocks fit.
  const unsigned pairs = (static_cast<unsigned>(count) + 1U) / 2U;
  const auto part = static_cast<unsigned>(block);
  const auto parts = static_cast<unsigned>(blocks);
  const int first = static_cast<int>(pairs * part / parts) * 2;
  const int end = static_cast<int>(pairs * (part + 1U) / parts) * 2;
  return {first, (end < count ? end : count) - first};
}

}  // namespace krait::decode_detail
