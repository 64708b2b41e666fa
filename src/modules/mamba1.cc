#include "krait/modules/mamba1.h"

#include <cmath>

#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "krait/ops/linear.h"
#include "krait/ops/norm.h"
#include "krait/ops/selective_step.h"
#include "modules/initialize.h"
#include "modules/short_conv.h"
#include "modules/step.h"

namespace krait {
namespace {

Mamba1Config complete(Mamba1Config c) {
  require(c.d_model > 0 && c.d_state > 0 && c.d_conv > 0, "Mamba1: d_model ", c.d_model, ", d_state ",
          c.d_state, ", d_conv ", c.d_conv, ": each must be positive");
  if (c.d_inner == 0) c.d_inner = static_cast<std::int64_t>(c.expand * static_cast<double>(c.d_model));
  if (c.dt_rank == 0) c.dt_rank = (c.d_model + 15) / 16;
  require(c.d_inner > 0 && c.dt_rank > 0, "Mamba1: d_inner ", c.d_inner, ", dt_rank ", c.dt_rank,
          ": each must be positive");
  return c;
}

}  // namespace

Mamba1::Mamba1(const Mamba1Config& config) : config_(complete(config)) {
  const auto& c = config_;
  in_proj_ = {.in = c.d_model, .out = 2 * c.d_inner, .has_bias = c.bias};
  conv1d_ = {.channels = c.d_inner, .d_conv = c.d_conv, .has_bias = c.conv_bias};
  x_proj_ = {.in = c.d_inner, .out = c.dt_rank + 2 * c.d_state};
  dt_proj_ = {.in = c.dt_rank, .out = c.d_inner, .has_bias = true};
  out_proj_ = {.in = c.d_inner, .out = c.d_model, .has_bias = c.bias};
}

Mamba1::ScanInputs Mamba1::split(const Tensor& dt_B_C) const {
  const auto& c = config_;
  return {.dt = dt_B_C.slice(1, 0, c.dt_rank),
          .B = dt_B_C.slice(1, c.dt_rank, c.dt_rank + c.d_state),
          .C = dt_B_C.slice(1, c.dt_rank + c.d_state, c.dt_rank + 2 * c.d_state)};
}

// The bias of dt_proj is added inside the scan, in front of the softplus.
Tensor Mamba1::delta_of(Context& ctx, const Tensor& dt) const {
  return linear(ctx, {.x = dt, .weight = dt_proj_.weight});
}

SelectiveScanArgs Mamba1::scan_args(const Batch& batch, const Tensor& x, const Tensor& delta,
                                    const ScanInputs& inputs, const Tensor& z,
                                    const Tensor& initial_state) const {
  const auto channels_first = [&](const Tensor& t) { return batch.fold(t).transpose(1, 2); };
  return {.u = channels_first(x),
          .delta = channels_first(delta),
          .A = A_,
          .B = channels_first(inputs.B),
          .C = channels_first(inputs.C),
          .D = D_,
          .z = channels_first(z),
          .delta_bias = dt_proj_.bias,
          .initial_state = initial_state,
          .seq_idx = batch.seq_idx(),
          .cu_seqlens = batch.cu_seqlens(),
          .delta_softplus = true};
}

Tensor Mamba1::forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer, Tape* tape,
                       Tensor* sum) const {
  if (tape == nullptr && batch.is_step()) return step(ctx, {.hidden = hidden}, batch, layer);
  const auto& c = config_;
  const Tensor xz = in_proj_(ctx, hidden);
  const Tensor x = short_conv(ctx, conv1d_, xz.slice(1, 0, c.d_inner), Activation::silu, batch, layer, tape);
  const Tensor z = xz.slice(1, c.d_inner, 2 * c.d_inner);

  Tensor dt_B_C = x_proj_(ctx, x);
  const Tensor projected = dt_B_C;
  if (c.mixer_rms_eps && tape != nullptr) dt_B_C = ctx.empty(projected.shape(), projected.dtype());
  const auto [dt, B, C] = split(dt_B_C);
  if (c.mixer_rms_eps) {
    const auto from = split(projected);
    rms_norm(ctx, {.x = from.dt, .eps = *c.mixer_rms_eps, .out = dt});
    rms_norm(ctx, {.x = from.B, .eps = *c.mixer_rms_eps, .out = B});
    rms_norm(ctx, {.x = from.C, .eps = *c.mixer_rms_eps, .out = C});
  }
  const Tensor delta = delta_of(ctx, dt);

  Tensor y = ctx.empty(x.shape(), x.dtype());
  Tensor checkpoints;
  EdgeStates states;
  if (batch.has_states()) states = edge_states(ctx, batch, batch.pool().ssm(layer), layer, "ssm", tape);
  SelectiveScanArgs args = scan_args(batch, x, delta, {dt, B, C}, z, states.initial);
  args.return_last_state = states.last.defined();
  args.last_state = states.last;
  args.out = batch.fold(y).transpose(1, 2);
  args.return_checkpoints = tape != nullptr;
  checkpoints = selective_scan(ctx, args).checkpoints;
  if (states.last) batch.scatter(ctx, states.last, batch.pool().ssm(layer));
  if (tape != nullptr) {
    Tape::Frame& frame = tape->frame(layer, "mixer");
    frame.keep("hidden", hidden);
    frame.keep("xz", xz);
    frame.keep("x", x);
    frame.keep("projected", projected);
    frame.keep("dt_B_C", dt_B_C);
    frame.keep("y", y);
    if (checkpoints) frame.keep("checkpoints", checkpoints);
  }
  return out_proj_(ctx, y, sum, tape != nullptr);
}

Tensor Mamba1::step(Context& ctx, const StepInput& input, const Batch& batch, int layer) const {
  const auto& c = config_;
  const ProjectionResult projected =
      project(ctx, input, in_proj_, step_conv(conv1d_, batch, layer, /*first=*/0));
  const Tensor& x = projected.convolved;
  const ScanInputs in = split(x_proj_(ctx, x));
  if (c.mixer_rms_eps)
    for (const Tensor& part : {in.dt, in.B, in.C})
      rms_norm(ctx, {.x = part, .eps = *c.mixer_rms_eps, .out = part});
  const Tensor y = selective_step(ctx, {.state = batch.pool().ssm(layer),
                                        .x = x,
                                        .low_dt = in.dt,
                                        .dt_weight = dt_proj_.weight,
                                        .dt_bias = dt_proj_.bias,
                                        .A = A_,
                                        .B = in.B,
                                        .C = in.C,
                                        .D = D_,
                                        .z = projected.out.slice(1, c.d_inner, 2 * c.d_inner),
                                        .state_batch_indices = batch.state_indices()});
  return out_proj_(ctx, y);
}

Tensor Mamba1::backward(Context& ctx, const Tensor& dout, const Batch& batch, int layer, Tape& tape) const {
  const auto& c = config_;
  const Tape::Frame& frame = tape.frame(layer, "mixer");
  const Tensor& xz = frame["xz"];
  const Tensor& x = frame["x"];
  const auto channels_first = [&](const Tensor& t) { return batch.fold(t).transpose(1, 2); };

  const Tensor dy = out_proj_.backward(ctx, frame["y"], dout);
  const Tensor dxz = ctx.empty(xz.shape(), xz.dtype());
  const Tensor dx = ctx.empty(x.shape(), x.dtype());
  const Tensor ddelta = ctx.empty(x.shape(), x.dtype());
  const Tensor ddt_B_C = ctx.empty(frame["dt_B_C"].shape(), x.dtype());
  const auto [ddt, dB, dC] = split(ddt_B_C);
  const Tensor dA = dA_log_ ? ctx.zeros(A_.shape()) : Tensor();
  const ScanInputs inputs = split(frame["dt_B_C"]);
  const Tensor z = xz.slice(1, c.d_inner, 2 * c.d_inner);
  // A small product, computed anew: kept, it would be a seventh of what a layer keeps.
  const Tensor delta = delta_of(ctx, inputs.dt);
  selective_scan_backward(
      ctx, {.forward = scan_args(batch, x, delta, inputs, z, kept_initial_states(layer, "ssm", tape)),
            .dout = channels_first(dy),
            .checkpoints = frame.has("checkpoints") ? frame["checkpoints"] : Tensor(),
            .du = channels_first(dx),
            .ddelta = channels_first(ddelta),
            .dz = channels_first(dxz.slice(1, c.d_inner, 2 * c.d_inner)),
            .dB = channels_first(dB),
            .dC = channels_first(dC),
            .dA = dA,
            .dD = dD_,
            .ddelta_bias = dt_proj_.dbias});
  if (dA) negative_exp_backward(ctx, A_, dA, dA_log_);
  linear_backward(
      ctx,
      {.x = inputs.dt, .weight = dt_proj_.weight, .dout = ddelta, .dx = ddt, .dweight = dt_proj_.dweight});
  if (c.mixer_rms_eps) {
    const auto [from_dt, from_B, from_C] = split(frame["projected"]);
    norm_backward(ctx, NormKind::rms, {.x = from_dt, .eps = *c.mixer_rms_eps, .dout = ddt, .dx = ddt});
    norm_backward(ctx, NormKind::rms, {.x = from_B, .eps = *c.mixer_rms_eps, .dout = dB, .dx = dB});
    norm_backward(ctx, NormKind::rms, {.x = from_C, .eps = *c.mixer_rms_eps, .dout = dC, .dx = dC});
  }
  linear_backward(ctx, {.x = x,
                        .weight = x_proj_.weight,
                        .dout = ddt_B_C,
                        .dx = dx,
                        .accumulate_dx = true,
                        .dweight = x_proj_.dweight});
  short_conv_backward(ctx, conv1d_, xz.slice(1, 0, c.d_inner), Activation::silu, batch, layer, tape, dx,
                      dxz.slice(1, 0, c.d_inner));
  return in_proj_.backward(ctx, frame["hidden"], dxz);
}

bool Mamba1::describe(DecodeModel& model, DecodeLayer& layer) const {
  const auto& c = config_;
  model.sizes.mamba2 = false;
  model.sizes.d_inner = c.d_inner;
  model.sizes.d_state = c.d_state;
  model.sizes.dt_rank = c.dt_rank;
  model.options = {.mixer_norm_eps = c.mixer_rms_eps};
  layer.in_weight = in_proj_.weight;
  layer.in_bias = in_proj_.bias;
  layer.conv_weight = conv1d_.weight.squeeze(1);
  layer.conv_bias = conv1d_.bias;
  layer.x_weight = x_proj_.weight;
  layer.dt_weight = dt_proj_.weight;
  layer.dt_bias = dt_proj_.bias;
  layer.A = A_;
  layer.D = D_;
  layer.out_weight = out_proj_.weight;
  layer.out_bias = out_proj_.bias;
  return true;
}

LayerStateShape Mamba1::state_shape() const {
  return {.conv = {config_.d_inner, config_.d_conv - 1}, .ssm = {config_.d_inner, config_.d_state}};
}

void Mamba1::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  const auto& c = config_;
  visitor({.name = prefix + ".A_log",
           .shape = {c.d_inner, c.d_state},
           .tensor = A_log_,
           .gradient = dA_log_,
           .no_weight_decay = true});
  visitor(
      {.name = prefix + ".D", .shape = {c.d_inner}, .tensor = D_, .gradient = dD_, .no_weight_decay = true});
  in_proj_.visit(prefix + ".in_proj", visitor);
  conv1d_.visit(prefix + ".conv1d", visitor);
  x_proj_.visit(prefix + ".x_proj", visitor);
  dt_proj_.visit(prefix + ".dt_proj", visitor);
  out_proj_.visit(prefix + ".out_proj", visitor);
}

void Mamba1::initialize(Rng& rng) {
  const auto& c = config_;
  krait::initialize(in_proj_, rng);
  krait::initialize(conv1d_, rng);
  krait::initialize(x_proj_, rng);
  const double bound = c.dt_scale / std::sqrt(static_cast<double>(c.dt_rank));
  dt_proj_.weight = c.dt_init_random ? uniform(rng, {c.d_inner, c.dt_rank}, -bound, bound)
                                     : constant({c.d_inner, c.dt_rank}, bound);
  dt_proj_.bias = initial_dt_bias(rng, c.d_inner, c.dt_min, c.dt_max, c.dt_init_floor);
  A_log_ = Tensor::empty({c.d_inner, c.d_state});
  for (std::int64_t i = 0; i < A_log_.numel(); ++i)
    A_log_.data<float>()[i] = std::log(static_cast<float>(i % c.d_state + 1));
  D_ = constant({c.d_inner}, 1.0);
  krait::initialize(out_proj_, rng);
}

void Mamba1::prepare(Context& ctx) { A_ = negative_exp(ctx, A_log_); }

}  // namespace krait
