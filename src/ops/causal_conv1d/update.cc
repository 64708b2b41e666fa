#include <algorithm>
#include <vector>

#include "core/build.h"
#include "ops/causal_conv1d/conv.h"

namespace krait {
namespace {

constexpr std::string_view kOp = "causal_conv1d_update";

void validate_row_index(std::string_view name, const Tensor& t, std::int64_t rows) {
  if (!t) return;
  require_index_dtype(kOp, name, t);
  require(t.shape() == Dims{rows}, "[causal_conv1d_update] ", name, " has shape ", t.shape(), ", expected ",
          Dims{rows}, ": one value for each batch row");
}

// The rows that take part, each with its own row of the state.
std::vector<conv_detail::Slot> slots_of(const CausalConv1dUpdateArgs& args) {
  const std::int64_t rows = args.x.size(0);
  const std::int64_t ring_size = args.conv_state.size(2);
  std::vector<conv_detail::Slot> slots;
  slots.reserve(static_cast<std::size_t>(rows));
  for (std::int64_t b = 0; b < rows; ++b) {
    conv_detail::Slot slot{.row = b, .state = b};
    if (args.conv_state_indices) slot.state = index_at(args.conv_state_indices, b);
    if (slot.state < 0 || (args.seq_idx && index_at(args.seq_idx, b) < 0)) continue;
    require(slot.state < args.conv_state.size(0), "[causal_conv1d_update] conv_state_indices[", b, "] is ",
            slot.state, ", expected less than the ", args.conv_state.size(0), " rows of conv_state");
    if (args.cache_seqlens) {
      const std::int64_t written = index_at(args.cache_seqlens, b);
      require(written >= 0, "[causal_conv1d_update] cache_seqlens[", b, "] is ", written,
              ", expected 0 or more");
      slot.ring = ring_size > 0 ? written % ring_size : 0;
    }
    slots.push_back(slot);
  }
  if (args.conv_state_indices) {
    std::vector<std::int64_t> used;
    used.reserve(slots.size());
    for (const auto& slot : slots) used.push_back(slot.state);
    std::sort(used.begin(), used.end());
    const auto twice = std::adjacent_find(used.begin(), used.end());
    require(twice == used.end(), "[causal_conv1d_update] conv_state_indices names row ",
            twice == used.end() ? 0 : *twice, " twice: two batch rows would update one state");
  }
  return slots;
}

}  // namespace

Tensor causal_conv1d_update(Context& ctx, const CausalConv1dUpdateArgs& args) {
  using namespace conv_detail;
  const Tensor& x = args.x;
  require(x.defined(), "[causal_conv1d_update] x is missing");
  require_on_device(ctx, kOp,
                    {{"x", x},
                     {"conv_state", args.conv_state},
                     {"weight", args.weight},
                     {"bias", args.bias},
                     {"cache_seqlens", args.cache_seqlens},
                     {"conv_state_indices", args.conv_state_indices},
                     {"seq_idx", args.seq_idx},
                     {"out", args.out}});
  require_float(kOp, "x", x, x);
  require(x.ndim() == 2 || x.ndim() == 3, "[causal_conv1d_update] x has shape ", x.shape(),
          ", expected (B, D) or (B, D, T)");
  const std::int64_t kernel = validate_weight(kOp, x, args.weight, args.bias);
  const Tensor& state = args.conv_state;
  require(state.defined(), "[causal_conv1d_update] conv_state is missing");
  require_float(kOp, "conv_state", state, x);
  require(state.ndim() == 3 && state.size(1) == x.size(1) && state.size(2) >= kernel - 1,
          "[causal_conv1d_update] conv_state has shape ", state.shape(), ", expected (R, ", x.size(1),
          ", S) with S >= K - 1 = ", kernel - 1);
  require(args.conv_state_indices.defined() || state.size(0) == x.size(0),
          "[causal_conv1d_update] conv_state has ", state.size(0), " rows, expected ", x.size(0),
          ": one for each batch row");
  validate_row_index("cache_seqlens", args.cache_seqlens, x.size(0));
  validate_row_index("conv_state_indices", args.conv_state_indices, x.size(0));
  validate_row_index("seq_idx", args.seq_idx, x.size(0));
  require_own_elements(kOp, "conv_state", state);
  require(!may_overlap(state, x), "[causal_conv1d_update] conv_state overlaps x");
  if (args.out) {
    require(args.out.dtype() == x.dtype() && args.out.shape() == x.shape(),
            "[causal_conv1d_update] out has shape ", args.out.shape(), " and dtype ", args.out.dtype(),
            ", expected ", x.shape(), " and ", x.dtype(), " as x");
    require(!may_overlap(args.out, x), "[causal_conv1d_update] out overlaps x");
    require(!may_overlap(args.out, state), "[causal_conv1d_update] out overlaps conv_state");
  }
  const bool reference = takes_reference(kOp, ctx, args.path, x);
  const Tensor out = args.out ? args.out : ctx.empty(x.shape(), x.dtype());
  const bool single = x.ndim() == 2;
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      update_cuda(ctx, {.x = single ? x.unsqueeze(2) : x,
                        .conv_state = state,
                        .weight = args.weight,
                        .bias = args.bias,
                        .out = single ? out.unsqueeze(2) : out,
                        .activation = args.activation,
                        .cache_seqlens = args.cache_seqlens,
                        .conv_state_indices = args.conv_state_indices,
                        .seq_idx = args.seq_idx});
      ctx.set_backend(kOp, "cuda");
      return out;
    }
  }
  const std::vector<Slot> slots = slots_of(args);
  const Update update{.x = single ? x.unsqueeze(2) : x,
                      .conv_state = state,
                      .weight = args.weight,
                      .bias = args.bias,
                      .out = single ? out.unsqueeze(2) : out,
                      .activation = args.activation,
                      .slots = &slots};
  if (static_cast<std::int64_t>(slots.size()) < x.size(0)) {
    auto slot = slots.begin();
    for (std::int64_t b = 0; b < x.size(0); ++b) {
      if (slot != slots.end() && slot->row == b)
        ++slot;
      else
        out.select(0, b).fill(0.0);
    }
  }
  if (reference)
    update_reference(ctx, update);
  else
    update_simd(ctx, update);
  ctx.set_backend(kOp, reference ? "reference" : concat("simd (", simd_target(), ")"));
  return out;
}

}  // namespace krait
