// What the kernel is given: plain pointers and sizes, as one parameter.
#pragma once

#include <cstdint>

#include "core/cuda/gpu.h"
#include "krait/core/dtype.h"
#include "ops/decode_step/plan.h"

namespace krait::decode_detail {

// Parameters of a kernel may have 32 KB from CUDA 12.1 on, 4 KB before.
#if defined(CUDART_VERSION) && CUDART_VERSION >= 12010
inline constexpr int kMostLayers = 128;
#else
inline constexpr int kMostLayers = 24;
#endif

struct LayerPointers {
  const float* norm_weight;
  const float* norm_bias;
  const void* in_weight;
  const float* in_bias;
  const float* conv_weight;
  const float* conv_bias;
  float* conv_state;
  const void* x_weight;
  const void* dt_weight;
  const float* dt_bias;
  const float* A;
  const float* D;
  void* ssm_state;
  const float* gated_norm_weight;
  const void* out_weight;
  const float* out_bias;
};

// Results of a step pass between blocks as words of 8 bytes: two values of the model's dtype, or fewer, below
// the number of the layer that they belong to, counted from the first launch on (its epoch).
struct Words {
  std::uint64_t* projected;  // of in_proj, convolved where there is a convolution
  std::uint64_t* low;        // Mamba-1: of x_proj
  std::uint64_t* y;          // of the recurrence
  std::uint64_t* hidden;     // of out_proj
};

struct Params {
  int layers;
  int d_model;
  int d_inner;
  int d_state;
  int in_rows;
  int conv_first;
  int conv_channels;
  int vocabulary;
  float model_share;  // 1 / d_model
  float group_share;  // 1 / (d_inner / groups)
  int model_steps;    // steps_of(d_model)
  int inner_steps;
  int model_tile;
  int inner_tile;
  int state_tile;
  int ring;
  int piece_shift;  // log2 of bytes that are copied at once
  int in_flight;    // such pieces, at most
  int heads;
  int headdim;
  int heads_per_group;
  int groups;
  int dt_rank;
  bool rms;
  bool gated_norm;
  bool norm_before_gate;
  bool D_by_channel;
  bool mixer_norm;
  float eps;
  float gated_norm_eps;
  float mixer_norm_eps;
  float dt_low;
  float dt_high;
  DType state_dtype;
  const std::int64_t* id;
  const std::int64_t* row;
  std::int64_t state_rows;
  std::int64_t conv_stride[3];  // row, channel, tap
  std::int64_t ssm_stride;      // of a row
  const void* embedding;
  const float* norm_weight;
  const float* norm_bias;
  const void* head;
  float* logits;
  unsigned* epoch;  // of the last layer of the last launch
  Words words;
  LayerPointers layer[kMostLayers];
};

// Of DType f16 or bf16.
void launch_mamba1(Context& ctx, DType dtype, const DecodePlan& plan, const Params& params);
void launch_mamba2(Context& ctx, DType dtype, const DecodePlan& plan, const Params& params);

}  // namespace krait::decode_detail
