#include "ops/decode_step/plan.h"

#include <algorithm>
#include <bit>

namespace krait::decode_detail {
namespace {

bool mixer_fits(const DecodeSizes& s) {
  if (s.mamba2) {
    if (s.heads < 1 || s.groups < 1 || s.groups > kMostGroups || s.d_inner % s.heads != 0) return false;
    if (s.heads % s.groups != 0 || s.d_inner / s.heads % 2 != 0) return false;
    return s.d_state % 4 == 0 && s.d_state <= kMostStates && s.d_inner / s.groups % 4 == 0;
  }
  // A channel's states are divided among a power of two of lanes, 4 each, and its row of dt_proj too.
  const std::int64_t lanes = s.d_state / 4;
  return s.d_state % 4 == 0 && lanes <= 16 && std::has_single_bit(static_cast<std::uint64_t>(lanes)) &&
         s.dt_rank >= 8 && s.dt_rank % 8 == 0 && s.dt_rank <= lanes * 8 * kMostDtPieces &&
         s.dt_rank + 2 * s.d_state <= kMostLow;
}

}  // namespace

std::int64_t conv_channels(const DecodeSizes& s) {
  return s.mamba2 ? s.d_inner + 2 * s.groups * s.d_state : s.d_inner;
}

std::int64_t in_rows(const DecodeSizes& s) {
  return s.mamba2 ? s.d_inner + conv_channels(s) + s.heads : 2 * s.d_inner;
}

std::int64_t word_count(const DecodeSizes& s) {
  return words_for(in_rows(s)) + words_for(s.mamba2 ? 0 : s.dt_rank + 2 * s.d_state) + words_for(s.d_inner) +
         words_for(s.d_model);
}

DecodePlan choose_decode_plan(const DecodeSizes& s, int most_layers, int multiprocessors,
                              std::int64_t shared_memory) {
  DecodePlan plan;
  constexpr std::int64_t kMostVocabulary = std::int64_t{1} << 24;
  if (s.layers < 1 || s.layers > most_layers || s.vocabulary < 1 || s.vocabulary > kMostVocabulary)
    return plan;
  for (const std::int64_t columns : {s.d_model, s.d_inner})
    if (columns < 8 || columns % 8 != 0) return plan;
  if (s.d_model > kMostModel || s.d_inner > kMostInner) return plan;
  if (s.d_state < 4 || !mixer_fits(s)) return plan;
  plan.model_tile = tile_rows(s.d_model);
  plan.inner_tile = tile_rows(s.d_inner);
  plan.state_tile = static_cast<int>(std::min<std::int64_t>(kTileBytes / (s.d_state * 4) / 2 * 2, kThreads));
  const std::int64_t x = std::int64_t{kWarps} * kStep * 2 * steps_of(std::max(s.d_model, s.d_inner));
  const std::int64_t sums = std::int64_t{2} * kWarps * kMostRows * 4;
  const std::int64_t low =
      (2 * (s.mamba2 ? 2 * s.groups * s.d_state : s.dt_rank + 2 * s.d_state) + 127) / 128 * 128 +
      (s.mamba2 ? 8 * kWarps : 0);
  const std::int64_t ring = (shared_memory - kDeclaredShared - x - sums - low) / 1024 * 1024;
  // Two tiles, so that one arrives while the other is read.
  if (ring < 2 * kTileBytes) return plan;
  plan.ring = static_cast<int>(ring);
  plan.piece_shift = kPieceShift;
  plan.in_flight = kInFlight;
  plan.shared = static_cast<int>(ring + x + sums + low);
  // Every block has rows of every stage but x_proj: what it reads is written again only after it has itself
  // written what that depends on.
  const std::int64_t fewest = std::min({s.d_model / 2, s.d_inner / 2});
  plan.blocks = static_cast<int>(std::min<std::int64_t>({multiprocessors, fewest, kMostBlocks}));
  return plan;
}

}  // namespace krait::decode_detail
