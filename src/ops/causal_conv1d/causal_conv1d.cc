#include "krait/ops/causal_conv1d.h"

#include "core/build.h"
#include "core/dispatch.h"
#include "ops/causal_conv1d/conv.h"

namespace krait {
namespace conv_detail {

void require_float(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x) {
  require(is_float(t.dtype()), "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
  require(t.dtype() != DType::f64 || x.dtype() == DType::f64, "[", op, "] ", name,
          " has dtype f64 beside x of ", x.dtype(), ": f64 needs x in f64 too");
}

std::int64_t validate_weight(std::string_view op, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  require(weight.defined(), "[", op, "] weight is missing");
  require_float(op, "weight", weight, x);
  require(weight.ndim() == 2 && weight.size(0) == x.size(1), "[", op, "] weight has shape ", weight.shape(),
          ", expected (", x.size(1), ", K): one row for each channel");
  require(weight.size(1) >= 1, "[", op, "] weight has shape ", weight.shape(), ", expected K >= 1");
  if (bias) {
    require_float(op, "bias", bias, x);
    require(bias.shape() == Dims{x.size(1)}, "[", op, "] bias has shape ", bias.shape(), ", expected ",
            Dims{x.size(1)}, ": one value for each channel");
  }
  return weight.size(1);
}

Dims validate_inputs(std::string_view op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                     const Tensor& initial_states, const Tensor& seq_idx, const Tensor& cu_seqlens,
                     const Tensor& state_positions) {
  require(x.defined(), "[", op, "] x is missing");
  require_float(op, "x", x, x);
  require(x.ndim() == 3, "[", op, "] x has shape ", x.shape(), ", expected (B, D, L)");
  const std::int64_t width = validate_weight(op, x, weight, bias) - 1;
  validate_sequences(op, x.size(0), x.size(2), seq_idx, cu_seqlens, state_positions);
  const Dims state_shape{cu_seqlens ? cu_seqlens.size(0) - 1 : x.size(0), x.size(1), width};
  if (initial_states) {
    require_float(op, "initial_states", initial_states, x);
    require(initial_states.shape() == state_shape, "[", op, "] initial_states has shape ",
            initial_states.shape(), ", expected ", state_shape, ": the K - 1 inputs before each sequence");
  }
  return state_shape;
}

bool takes_reference(std::string_view op, const Context& ctx, ConvPath path, const Tensor& x) {
  if (ctx.on_gpu()) {
    require(path == ConvPath::automatic, "[", op, "] the path ",
            path == ConvPath::simd ? "simd" : "reference", " is one of the CPU, expected automatic on a GPU");
    require(x.dtype() != DType::f64, "[", op, "] x has dtype f64, expected f32, bf16 or f16 on a GPU");
    return false;
  }
  require(path != ConvPath::simd || x.dtype() != DType::f64, "[", op,
          "] the path simd takes f32, bf16 or f16, x has dtype f64");
  if (path == ConvPath::automatic) return ctx.reference() || x.dtype() == DType::f64;
  return path == ConvPath::reference;
}

ConvKernel choose_kernel(std::int64_t kernel, std::initializer_list<Tensor> tensors) {
  if (kernel < 2 || kernel > 4) return ConvKernel::plain;
  const DType dtype = tensors.begin()->dtype();
  const std::int64_t vector = rows_vector(size_of(dtype));
  for (const Tensor& t : tensors) {
    if (!t) continue;
    constexpr std::int64_t kLargestStep = std::int64_t{1} << 28;  // kernels count a step's bytes in an int
    const auto steps_by_vectors = [&](int dim) { return t.size(dim) <= 1 || t.stride(dim) % vector == 0; };
    if (t.dtype() != dtype || t.stride(1) != 1 || t.size(1) % vector != 0 || !steps_by_vectors(0) ||
        !steps_by_vectors(2) || t.stride(2) > kLargestStep || t.stride(2) < -kLargestStep ||
        reinterpret_cast<std::uintptr_t>(t.raw()) % 16 != 0)
      return ConvKernel::plain;
  }
  return ConvKernel::rows;
}

std::int64_t choose_tokens(std::int64_t rows, std::int64_t length, std::int64_t channels, int vector,
                           std::int64_t blocks) {
  constexpr std::int64_t kLeast = 2 * kTurnTokens;
  constexpr std::int64_t kMost = 85 * kTurnTokens;
  // What the beginning of a walk costs, in tokens: its filter, the inputs before it, and the first loads'
  // way.
  constexpr std::int64_t kBeginning = 8;
  const auto parts = [](std::int64_t n, std::int64_t size) { return (n + size - 1) / size; };
  const std::int64_t channel_blocks = parts(channels, 32 * vector);
  std::int64_t best = kLeast;
  std::int64_t least = 0;
  for (std::int64_t tokens = kMost; tokens >= kLeast; tokens -= kTurnTokens) {
    const std::int64_t needed = parts(rows * parts(length, tokens), kWarps) * channel_blocks;
    const std::int64_t waves = parts(needed, std::max<std::int64_t>(blocks, 1));
    // The blocks of one wave end together, those of several half a walk apart.
    const std::int64_t time = waves * (tokens + kBeginning) + (waves > 1 ? tokens / 2 : 0);
    if (least > 0 && time >= least) continue;
    least = time;
    best = tokens;
  }
  return best;
}

namespace {

// to (D, K-1) = the window after `count` tokens of `run`. Columns are written in ascending order and read
// at or behind the one being written, so that `to` may be the initial state itself.
void write_window(const TokenRuns& runs, const TokenRun& run, std::int64_t count, const Tensor& x,
                  const Tensor& initial_states, const Tensor& to) {
  const Tensor row = x.select(0, run.row);
  const std::int64_t width = to.size(1);
  for (std::int64_t j = 0; j < width; ++j) {
    const Tensor column = to.select(1, j);
    const std::int64_t i = count - width + j;
    if (i >= 0)
      column.copy_from(row.select(1, runs.position(run, i)));
    else if (run.first && initial_states)
      column.copy_from(initial_states.select(0, run.sequence).select(1, i + width));
    else
      column.fill(0.0);
  }
}

// x's shape and, for channel-last x, channel-last strides.
Tensor empty_like(Context& ctx, const Tensor& x) {
  const bool channel_last = x.stride(1) == 1 && x.size(1) > 1;
  if (channel_last) return ctx.empty({x.size(0), x.size(2), x.size(1)}, x.dtype()).transpose(1, 2);
  return ctx.empty(x.shape(), x.dtype());
}

}  // namespace
}  // namespace conv_detail

CausalConv1dResult causal_conv1d(Context& ctx, const CausalConv1dArgs& args) {
  using namespace conv_detail;
  constexpr std::string_view op = "causal_conv1d";
  const Tensor& x = args.x;
  require_on_device(ctx, op,
                    {{"x", x},
                     {"weight", args.weight},
                     {"bias", args.bias},
                     {"initial_states", args.initial_states},
                     {"out", args.out},
                     {"final_states", args.final_states},
                     {"states", args.states}});
  const Tensor seq_idx = ctx.to_host(args.seq_idx);
  const Tensor cu_seqlens = ctx.to_host(args.cu_seqlens);
  const Tensor state_positions = ctx.to_host(args.state_positions);
  const Dims state_shape = validate_inputs(op, x, args.weight, args.bias, args.initial_states, seq_idx,
                                           cu_seqlens, state_positions);
  const std::int64_t rows = x.size(0);
  const std::int64_t channels = x.size(1);
  const std::int64_t length = x.size(2);
  const std::int64_t width = state_shape[2];
  if (args.out) {
    require(args.out.dtype() == x.dtype(), "[causal_conv1d] out has dtype ", args.out.dtype(), ", expected ",
            x.dtype(), " as x");
    require(args.out.shape() == x.shape(), "[causal_conv1d] out has shape ", args.out.shape(), ", expected ",
            x.shape());
    require(!may_overlap(args.out, x),
            "[causal_conv1d] out overlaps x: each input is read by K outputs, so out needs its own memory");
    require(!may_overlap(args.out, args.initial_states), "[causal_conv1d] out overlaps initial_states");
  }
  if (args.final_states) {
    require_float(op, "final_states", args.final_states, x);
    require(args.final_states.shape() == state_shape, "[causal_conv1d] final_states has shape ",
            args.final_states.shape(), ", expected ", state_shape);
    require(same_view(args.final_states, args.initial_states) ||
                !may_overlap(args.final_states, args.initial_states),
            "[causal_conv1d] final_states overlaps initial_states without being the same view");
    require(!may_overlap(args.final_states, x) && !may_overlap(args.final_states, args.out),
            "[causal_conv1d] final_states overlaps x or out");
  }
  require(!args.states || state_positions,
          "[causal_conv1d] states is given without state_positions, expected both");
  const Dims states_shape = state_positions ? Dims{rows, state_positions.size(1), channels, width} : Dims();
  if (args.states) {
    require(args.states.dtype() == x.dtype(), "[causal_conv1d] states has dtype ", args.states.dtype(),
            ", expected ", x.dtype(), " as x");
    require(args.states.shape() == states_shape, "[causal_conv1d] states has shape ", args.states.shape(),
            ", expected ", states_shape);
    for (const Tensor& other : {x, args.initial_states, args.out, args.final_states})
      require(!may_overlap(args.states, other), "[causal_conv1d] states overlaps another tensor");
  }
  const bool reference = takes_reference(op, ctx, args.path, x);

  const TokenRuns runs = cut_into_runs(rows, length, seq_idx, cu_seqlens, state_positions, false);
  CausalConv1dResult result;
  if (state_positions) result.states = args.states ? args.states : ctx.empty(states_shape, x.dtype());
  result.out = args.out ? args.out : empty_like(ctx, x);
  const Forward forward{.x = x,
                        .weight = args.weight,
                        .bias = args.bias,
                        .initial_states = args.initial_states,
                        .out = result.out,
                        .activation = args.activation,
                        .runs = &runs};
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      if (args.return_final_states || args.final_states)
        result.final_states = args.final_states ? args.final_states : ctx.empty(state_shape, x.dtype());
      const bool whole_rows = !seq_idx && !cu_seqlens && !state_positions;
      forward_cuda(ctx, forward, whole_rows, result.states, result.final_states);
      ctx.set_backend(op, "cuda");
      return result;
    }
  }
  if (reference)
    forward_reference(ctx, forward);
  else
    forward_simd(ctx, forward);
  for (const auto& [row, position] : runs.padding) result.out.select(0, row).select(1, position).fill(0.0);

  // After the outputs, which read initial_states, and before the final states, which may replace them.
  if (state_positions) {
    for (const StateRequest& wanted : runs.requests)
      write_window(runs, runs.runs[static_cast<std::size_t>(wanted.run)], wanted.count, x,
                   args.initial_states, result.states.select(0, wanted.row).select(0, wanted.slot));
  }
  if (args.return_final_states || args.final_states) {
    result.final_states = args.final_states ? args.final_states : ctx.empty(state_shape, x.dtype());
    for (const TokenRun& run : runs.runs)
      if (run.last)
        write_window(runs, run, run.count, x, args.initial_states,
                     result.final_states.select(0, run.sequence));
  }
  ctx.set_backend(op, reference ? "reference" : concat("simd (", simd_target(), ")"));
  return result;
}

Tensor causal_conv1d_varlen_states(Context& ctx, const Tensor& x, const Tensor& cu_seqlens,
                                   std::int64_t state_len, const Tensor& out) {
  constexpr std::string_view op = "causal_conv1d_varlen_states";
  require(x.defined() && cu_seqlens.defined(), "[", op, "] x and cu_seqlens must be given");
  require(x.ndim() == 2, "[", op, "] x has shape ", x.shape(), ", expected (T, D)");
  require(is_float(x.dtype()), "[", op, "] x has dtype ", x.dtype(), ", expected f32, f64, bf16 or f16");
  require(state_len >= 0, "[", op, "] state_len is ", state_len, ", expected 0 or more");
  require_on_device(ctx, op, {{"x", x}, {"out", out}});
  const Tensor offsets = ctx.to_host(cu_seqlens);
  validate_sequences(op, 1, x.size(0), {}, offsets, {});

  const std::int64_t sequences = offsets.size(0) - 1;
  const Dims shape = {sequences, x.size(1), state_len};
  require(!out || (out.shape() == shape && is_float(out.dtype())), "[", op, "] out has shape ", out.shape(),
          " and dtype ", out.dtype(), ", expected ", shape, " and f32, f64, bf16 or f16");
  require(!out || !may_overlap(out, x), "[", op, "] out overlaps x");
  const Tensor states = out ? out : ctx.empty(shape, x.dtype());
  ctx.fill(states, 0.0);
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t end = index_at(offsets, s + 1);
    const std::int64_t kept = std::min(state_len, end - index_at(offsets, s));
    ctx.copy(x.slice(0, end - kept, end).transpose(0, 1),
             states.select(0, s).slice(1, state_len - kept, state_len));
  }
  ctx.set_backend(op, "copy");
  return states;
}

}  // namespace krait
