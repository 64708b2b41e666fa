// Memory of the SIMD backward: what a worker holds, and the partial sums that items leave behind.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/selective_scan/scan.h"

namespace krait::scan {

// States of one kernel call; a complex state counts as two.
inline constexpr std::int64_t kStatesTogether = 4;
inline constexpr std::int64_t kLanes = 16;  // of the widest vector
// Floats of a step of a strip, for each lane, and of a step of a record at most.
inline constexpr std::int64_t kStripSize = 9;
inline constexpr std::int64_t kRecordSize = 4 * kStatesTogether * kLanes;

// A part of the rows, and blocks [first_block, last_block) of a group.
struct BackwardItem {
  std::int64_t first_row = 0;
  std::int64_t last_row = 0;
  std::int64_t part = 0;
  std::int64_t group = 0;
  std::int64_t segment = 0;
  std::int64_t first_block = 0;
  std::int64_t last_block = 0;
};

// A worker's memory, in floats. The imaginary halves of complex matrices follow the real ones.
struct BackwardScratch {
  std::int64_t steps = 0;  // of a tile
  std::int64_t width = 0;  // channels, a multiple of every vector
  std::int64_t d_state = 0;
  std::int64_t states_kept = 0;  // checkpoints
  std::int64_t fixed = 0;        // floats of all but the checkpoints, which lie behind
  // One strip for each vector of channels (cpu/strips-inl.h), kGap floats between two of them: strips a power
  // of two apart would share few sets of the cache.
  static constexpr std::int64_t kGap = 16;
  float* strips = nullptr;
  // Matrices (state, channel); log2(e) A, its imaginary half in quarter turns.
  float* A = nullptr;
  float* h = nullptr;  // states before the tile
  float* g = nullptr;  // gradient of the states after it, then before it
  float* constant_b = nullptr;
  float* constant_c = nullptr;
  // One number for each channel.
  float* bias = nullptr;
  float* skip = nullptr;
  float* largest_a = nullptr;  // |A| over the states
  // (step, state)
  float* b = nullptr;
  float* c = nullptr;
  float* record = nullptr;       // of a strip, for the states walked together (cpu/backward-inl.h)
  float* zeros = nullptr;        // a step of it
  float* checkpoints = nullptr;  // states before tiles

  // Lays the arrays out from `memory` on (null: only counts) and returns how many floats they take.
  std::int64_t place(float* memory) {
    std::int64_t floats = 0;
    // Arrays a multiple of a page apart would compete for the same sets of the cache.
    constexpr std::int64_t kApart = 5 * kLanes;
    const auto take = [&](float*& array, std::int64_t size) {
      if (memory != nullptr) array = memory + floats;
      floats += (size + kLanes - 1) / kLanes * kLanes + kApart;
    };
    take(strips, width * (kStripSize * steps + kGap));
    for (float** matrix : {&A, &h, &g, &constant_b, &constant_c}) take(*matrix, 2 * d_state * width);
    for (float** vector : {&bias, &skip, &largest_a}) take(*vector, width);
    for (float** factor : {&b, &c}) take(*factor, 2 * d_state * steps);
    take(record, steps * kRecordSize);
    take(zeros, kRecordSize);
    fixed = floats;
    take(checkpoints, states_kept * 2 * d_state * width);
    return floats;
  }
};

// Sums of one block of channels over the steps of a part of the rows, `width` channels each. Matrices are
// (state, channel), the imaginary half behind the real one.
struct BlockSums {
  float* dA = nullptr;
  float* dB = nullptr;  // constant ones only
  float* dC = nullptr;
  float* dD = nullptr;
  float* ddelta_bias = nullptr;

  // Lays the arrays out from `memory` on (null: only counts) and returns how many floats they take.
  std::int64_t place(float* memory, const Problem& p, std::int64_t width) {
    std::int64_t floats = 0;
    const auto take = [&](float*& array, std::int64_t size) {
      if (memory != nullptr) array = memory + floats;
      floats += size;
    };
    const std::int64_t matrix = (p.complex ? 2 : 1) * p.d_state * width;
    take(dA, matrix);
    take(dB, p.B.ndim() == 2 ? matrix : 0);
    take(dC, p.C.ndim() == 2 ? matrix : 0);
    take(dD, width);
    take(ddelta_bias, width);
    return floats;
  }
};

// What all workers share.
struct BackwardPlan {
  const Problem& problem;
  const Gradients& gradients;
  Division division;
  std::int64_t steps = 0;
  std::int64_t width = 0;
  std::vector<std::vector<Tile>> tiles;  // of each row
  float* blocks = nullptr;               // (part, group, block, BlockSums)
  // (segment, batch, token, group, real or imaginary part, state); null where not wanted or constant.
  float* dB = nullptr;
  float* dC = nullptr;

  [[nodiscard]] std::int64_t numbers() const { return problem.complex ? 2 : 1; }  // in a state
  [[nodiscard]] std::int64_t token_size() const { return problem.groups * numbers() * problem.d_state; }
  [[nodiscard]] std::int64_t tokens() const { return problem.u.size(0) * problem.u.size(2); }
  [[nodiscard]] std::int64_t block_size() const { return BlockSums().place(nullptr, problem, width); }
  [[nodiscard]] std::int64_t block_count() const { return problem.groups * division.blocks; }
  [[nodiscard]] float* block_at(std::int64_t part, std::int64_t group, std::int64_t block) const {
    return blocks + ((part * problem.groups + group) * division.blocks + block) * block_size();
  }
};

// Adds the sums of block `index` of all parts to the gradients of parameters.
void finish_block(const BackwardPlan& plan, std::int64_t index);
// Writes the gradients of variable factors at tokens [begin, end) of a batch row.
void finish_tokens(const BackwardPlan& plan, std::int64_t batch, std::int64_t begin, std::int64_t end);

}  // namespace krait::scan
