// The paths of causal_conv1d and its update. All take what the entry points have validated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string_view>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/tensor.h"
#include "krait/ops/causal_conv1d.h"
#include "ops/token_runs.h"

namespace krait::conv_detail {

struct Forward {
  Tensor x;               // (B, D, L)
  Tensor weight;          // (D, K)
  Tensor bias;            // (D) or absent
  Tensor initial_states;  // (sequences, D, K-1) or absent
  Tensor out;             // (B, D, L), x's dtype; places of padding tokens are left alone
  Activation activation = Activation::none;
  const TokenRuns* runs = nullptr;
};

void forward_reference(Context& ctx, const Forward& forward);
void forward_simd(Context& ctx, const Forward& forward);

struct Backward {
  Tensor x;               // (B, D, L)
  Tensor weight;          // (D, K)
  Tensor bias;            // (D) or absent
  Tensor initial_states;  // (sequences, D, K-1) or absent
  Activation activation = Activation::none;
  const TokenRuns* runs = nullptr;
  Tensor dout;             // (B, D, L)
  Tensor dfinal_states;    // (sequences, D, K-1) or absent
  Tensor dx;               // (B, D, L) or absent, may be dout; places of padding tokens are left alone
  Tensor dweight;          // (D, K) or absent, added to
  Tensor dbias;            // (D) or absent, added to
  Tensor dinitial_states;  // (sequences, D, K-1) or absent, may be dfinal_states
};

void backward_reference(Context& ctx, const Backward& backward);
void backward_simd(Context& ctx, const Backward& backward);

// One batch row with its row of the state; padding slots are not among them.
struct Slot {
  std::int64_t row = 0;    // of x and out
  std::int64_t state = 0;  // of conv_state
  std::int64_t ring = -1;  // where the ring is written next, in [0, S); -1: the state shifts
};

struct Update {
  Tensor x;           // (B, D, T)
  Tensor conv_state;  // (R, D, S)
  Tensor weight;      // (D, K)
  Tensor bias;        // (D) or absent
  Tensor out;         // (B, D, T), x's dtype
  Activation activation = Activation::none;
  const std::vector<Slot>* slots = nullptr;
};

void update_reference(Context& ctx, const Update& update);
void update_simd(Context& ctx, const Update& update);

// On a GPU. `whole_rows`: the runs are the rows, there are no index tensors. States that are asked for are
// written too: (B, M, D, K-1) at the runs' requests, and final ones, (sequences, D, K-1).
void forward_cuda(Context& ctx, const Forward& forward, bool whole_rows, const Tensor& states,
                  const Tensor& final_states);
void backward_cuda(Context& ctx, const Backward& backward, bool whole_rows);

// An update whose index tensors stay on the device.
struct StepArgs {
  Tensor x;           // (B, D, T)
  Tensor conv_state;  // (R, D, S)
  Tensor weight;      // (D, K)
  Tensor bias;        // (D) or absent
  Tensor out;         // (B, D, T)
  Activation activation = Activation::none;
  Tensor cache_seqlens;       // (B) or absent, as the other two
  Tensor conv_state_indices;  // (B)
  Tensor seq_idx;             // (B)
};
void update_cuda(Context& ctx, const StepArgs& args);

// The kernels of a GPU: `rows` is for channels side by side, 2 to 4 taps and one dtype, `plain` for all else.
enum class ConvKernel : std::uint8_t { plain, rows };
// `tensors`: those of shape (B, D, L), absent ones among them.
ConvKernel choose_kernel(std::int64_t kernel, std::initializer_list<Tensor> tensors);
// Rows are multiples of 16 bytes. Forward, a thread of `rows` computes kRowsTokens tokens of 8 bytes of
// channels.
constexpr int rows_vector(std::size_t element_bytes) { return static_cast<int>(16 / element_bytes); }
constexpr int forward_vector(std::size_t element_bytes) { return static_cast<int>(8 / element_bytes); }
inline constexpr int kRowsTokens = 16;
// Backward, a warp of `rows` walks some tokens of one row, kTurnTokens in a turn, each lane with
// kBackwardVector channels; kWarps neighbours are a block.
inline constexpr int kBackwardVector = 4;
inline constexpr int kTurnTokens = 6;
inline constexpr int kWarps = 4;
// How many tokens it walks, whole turns, of `rows` of `length`, on a GPU that holds `blocks` blocks at once:
// so that blocks come in whole waves, of which the last leaves few multiprocessors idle, and walks are long
// beside their beginning.
std::int64_t choose_tokens(std::int64_t rows, std::int64_t length, std::int64_t channels, int vector,
                           std::int64_t blocks);

// The shape and dtype rules that forward and update share: weight (D, K) and bias (D). Returns K.
std::int64_t validate_weight(std::string_view op, const Tensor& x, const Tensor& weight, const Tensor& bias);
// The rules that forward and backward share, each tensor but x and weight optional. Returns the shape of the
// states, (sequences, D, K-1).
Dims validate_inputs(std::string_view op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const Tensor& initial_states, const Tensor& seq_idx, const Tensor& cu_seqlens,
                     const Tensor& state_positions);
// A floating tensor; f64 only beside an x of f64.
void require_float(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x);
// Whether the reference runs; throws where `path`, or the device, cannot take x's dtype.
bool takes_reference(std::string_view op, const Context& ctx, ConvPath path, const Tensor& x);

// Taps as the SIMD kernels read them: weight (K, D) and bias (D), f32, contiguous.
struct Taps {
  Tensor weight;
  Tensor bias;  // zeros where none is given
};
Taps make_taps(Context& ctx, const Tensor& weight, const Tensor& bias);

}  // namespace krait::conv_detail
