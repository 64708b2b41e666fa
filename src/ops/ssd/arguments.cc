#include "ops/ssd/arguments.h"

#include "krait/core/error.h"

namespace krait::ssd_detail {

void check_float(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x) {
  require(is_float(t.dtype()), "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
  require(t.dtype() != DType::f64 || x.dtype() == DType::f64, "[", op, "] ", name,
          " has dtype f64 beside x of ", x.dtype(), ": f64 needs x in f64 too");
}

void check(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x, const Dims& shape,
           std::string_view meaning) {
  check_float(op, name, t, x);
  require(t.shape() == shape, "[", op, "] ", name, " has shape ", t.shape(), ", expected ", shape, ": ",
          meaning);
}

void bring_to_device(Context& ctx, std::string_view op, SsdArgs& args) {
  require_on_device(ctx, op,
                    {{"x", args.x},
                     {"dt", args.dt},
                     {"A", args.A},
                     {"B", args.B},
                     {"C", args.C},
                     {"D", args.D},
                     {"z", args.z},
                     {"dt_bias", args.dt_bias},
                     {"initial_states", args.initial_states},
                     {"out", args.out},
                     {"final_states", args.final_states},
                     {"states", args.states}});
  if (ctx.on_gpu()) {
    require(args.path == SsdPath::automatic && !ctx.reference(), "[", op,
            "] the paths by name are the CPU's, expected SsdPath::automatic on ", name_of(ctx.device()));
    require(!args.x || args.x.dtype() != DType::f64, "[", op,
            "] x has dtype f64, expected f32, bf16 or f16 on a GPU");
  }
  for (Tensor* t : {&args.seq_idx, &args.cu_seqlens, &args.state_positions}) *t = ctx.to_host(*t);
}

Dims state_shape_of(const SsdArgs& args) {
  const std::int64_t sequences = args.cu_seqlens ? args.cu_seqlens.size(0) - 1 : args.x.size(0);
  return {sequences, args.x.size(2), args.x.size(3), args.B.size(3)};
}

Problem problem_of(std::string_view op, const SsdArgs& args) {
  const Tensor& x = args.x;
  require(x.defined() && args.dt.defined() && args.A.defined() && args.B.defined() && args.C.defined(), "[",
          op, "] x, dt, A, B and C must be given");
  check_float(op, "x", x, x);
  require(x.ndim() == 4, "[", op, "] x has shape ", x.shape(), ", expected (B, L, H, P)");
  const std::int64_t rows = x.size(0);
  const std::int64_t length = x.size(1);
  const std::int64_t heads = x.size(2);
  const std::int64_t headdim = x.size(3);
  check(op, "dt", args.dt, x, {rows, length, heads}, "one value for each token and head");
  check(op, "A", args.A, x, {heads}, "one value for each head");
  require(args.B.ndim() == 4, "[", op, "] B has shape ", args.B.shape(), ", expected (", rows, ", ", length,
          ", G, N)");
  const std::int64_t groups = args.B.size(2);
  check(op, "B", args.B, x, {rows, length, groups, args.B.size(3)}, "(B, L, G, N)");
  check(op, "C", args.C, x, args.B.shape(), "as B");
  require(heads == 0 || (groups > 0 && heads % groups == 0), "[", op, "] B has ", groups,
          " groups, which do not divide the ", heads, " heads");
  if (args.z) check(op, "z", args.z, x, x.shape(), "as x");
  if (args.dt_bias) check(op, "dt_bias", args.dt_bias, x, {heads}, "one value for each head");
  Tensor D = args.D;
  if (D) {
    check_float(op, "D", D, x);
    require(D.shape() == Dims{heads} || D.shape() == (Dims{heads, headdim}), "[", op, "] D has shape ",
            D.shape(), ", expected ", Dims{heads}, " or ", Dims{heads, headdim});
    if (D.ndim() == 1) D = D.unsqueeze(1).expand({heads, headdim});
  }
  require(args.dt_limit.low <= args.dt_limit.high, "[", op, "] dt_limit is (", args.dt_limit.low, ", ",
          args.dt_limit.high, "), expected low <= high");
  require(args.chunk_size >= 0, "[", op, "] chunk_size is ", args.chunk_size,
          ", expected 0 (automatic) or more");
  validate_sequences(op, rows, length, args.seq_idx, args.cu_seqlens, args.state_positions);
  if (args.initial_states)
    check(op, "initial_states", args.initial_states, x, state_shape_of(args),
          "one state for each sequence and head");
  return {.x = x,
          .dt = args.dt,
          .A = args.A,
          .B = args.B,
          .C = args.C,
          .D = D,
          .z = args.z,
          .dt_bias = args.dt_bias,
          .initial_states = args.initial_states,
          .dt_softplus = args.dt_softplus,
          .dt_limit = args.dt_limit};
}

void widen_parameters(Context& ctx, Problem& problem) {
  for (Tensor* t : {&problem.A, &problem.D, &problem.dt_bias}) {
    if (!*t || (t->dtype() == DType::f32 && t->is_contiguous())) continue;
    Tensor copy = ctx.empty(t->shape());
    copy.copy_from(*t);
    *t = copy;
  }
}

}  // namespace krait::ssd_detail
