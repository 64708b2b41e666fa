#include "krait/modules/mamba2.h"

#include <cmath>

#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "krait/ops/linear.h"
#include "krait/ops/norm.h"
#include "modules/initialize.h"
#include "modules/short_conv.h"
#include "modules/step.h"

namespace krait {
namespace {

Mamba2Config complete(Mamba2Config c) {
  require(c.d_model > 0 && c.d_state > 0 && c.d_conv > 0 && c.headdim > 0 && c.ngroups > 0,
          "Mamba2: d_model ", c.d_model, ", d_state ", c.d_state, ", d_conv ", c.d_conv, ", headdim ",
          c.headdim, ", ngroups ", c.ngroups, ": each must be positive");
  if (c.d_ssm == 0) c.d_ssm = c.d_inner();
  require(c.d_ssm > 0 && c.d_ssm <= c.d_inner(), "Mamba2: d_ssm is ", c.d_ssm,
          ", expected 1 to d_inner = ", c.d_inner());
  require(c.d_ssm % c.headdim == 0, "Mamba2: d_ssm ", c.d_ssm, " is not a multiple of headdim ", c.headdim);
  require(c.d_ssm / c.headdim % c.ngroups == 0, "Mamba2: ", c.d_ssm / c.headdim,
          " heads are not a multiple of ngroups ", c.ngroups);
  return c;
}

Mamba2Config from_simple(const Mamba2SimpleConfig& s) {
  Mamba2Config c;
  c.d_model = s.d_model;
  c.d_state = s.d_state;
  c.d_conv = s.d_conv;
  c.conv_init = s.conv_init;
  c.expand = s.expand;
  c.headdim = s.headdim;
  c.ngroups = s.ngroups;
  c.A_init_range = s.A_init_range;
  c.dt_min = s.dt_min;
  c.dt_max = s.dt_max;
  c.dt_init_floor = s.dt_init_floor;
  c.dt_limit = s.dt_limit;
  c.bias = s.bias;
  c.conv_bias = s.conv_bias;
  c.chunk_size = s.chunk_size;
  c.learnable_init_states = s.learnable_init_states;
  return c;
}

}  // namespace

std::int64_t Mamba2Config::d_inner() const {
  return static_cast<std::int64_t>(expand * static_cast<double>(d_model));
}

Mamba2::Mamba2(const Mamba2Config& config) : config_(complete(config)) {
  const auto& c = config_;
  const std::int64_t conv_dim = c.d_ssm + 2 * c.ngroups * c.d_state;
  in_proj_ = {.in = c.d_model, .out = 2 * d_mlp() + c.d_ssm + conv_dim + nheads(), .has_bias = c.bias};
  conv1d_ = {.channels = conv_dim, .d_conv = c.d_conv, .has_bias = c.conv_bias};
  norm_ = {.channels = c.d_ssm, .eps = c.norm_eps};
  out_proj_ = {.in = c.d_inner(), .out = c.d_model, .has_bias = c.bias};
}

Mamba2::Projected Mamba2::split_projected(const Tensor& t) const {
  std::int64_t at = 0;
  const auto next = [&](std::int64_t width) {
    at += width;
    return t.slice(1, at - width, at);
  };
  // In this order: braces evaluate from left to right.
  return {.z0 = next(d_mlp()),
          .x0 = next(d_mlp()),
          .z = next(config_.d_ssm),
          .xBC = next(conv1d_.channels),
          .dt = next(nheads())};
}

Mamba2::Convolved Mamba2::split_convolved(const Tensor& t) const {
  const auto& c = config_;
  const std::int64_t T = t.size(0);
  const std::int64_t GN = c.ngroups * c.d_state;
  return {.x = t.slice(1, 0, c.d_ssm).view({T, nheads(), c.headdim}),
          .B = t.slice(1, c.d_ssm, c.d_ssm + GN).view({T, c.ngroups, c.d_state}),
          .C = t.slice(1, c.d_ssm + GN, c.d_ssm + 2 * GN).view({T, c.ngroups, c.d_state})};
}

// Without the gated norm, z gates inside the recurrence.
Tensor Mamba2::inner_gate(const Tensor& z) const {
  return config_.rmsnorm ? Tensor() : z.view({z.size(0), nheads(), config_.headdim});
}

Tensor Mamba2::by_head(const Tensor& D) const {
  return D && config_.D_has_hdim ? D.view({nheads(), config_.headdim}) : D;
}

SsdArgs Mamba2::ssd_args(const Batch& batch, const Projected& in, const Convolved& conv,
                         const Tensor& initial_states) const {
  const Tensor gate = inner_gate(in.z);
  return {.x = batch.fold(conv.x),
          .dt = batch.fold(in.dt),
          .A = A_,
          .B = batch.fold(conv.B),
          .C = batch.fold(conv.C),
          .D = by_head(D_),
          .z = gate ? batch.fold(gate) : Tensor(),
          .dt_bias = dt_bias_,
          .initial_states = initial_states,
          .seq_idx = batch.seq_idx(),
          .cu_seqlens = batch.cu_seqlens(),
          .dt_softplus = true,
          .dt_limit = config_.dt_limit};
}

// Where the rows of a batch have no states of their own, they start from the learnt ones.
Tensor Mamba2::learnt_states(const Batch& batch) const {
  if (!init_states_ || batch.has_states()) return {};
  return init_states_.unsqueeze(0).expand({batch.size(), nheads(), config_.headdim, config_.d_state});
}

Tensor Mamba2::forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer, Tape* tape,
                       Tensor* sum) const {
  if (tape == nullptr && batch.is_step()) return step(ctx, {.hidden = hidden}, batch, layer);
  const auto& c = config_;
  const std::int64_t T = hidden.size(0);
  const std::int64_t H = nheads();

  const Tensor projected = in_proj_(ctx, hidden);
  const Projected in = split_projected(projected);
  const Tensor convolved = short_conv(ctx, conv1d_, in.xBC, Activation::silu, batch, layer, tape);
  const Convolved conv = split_convolved(convolved);

  // The SSM's output beside the MLP's, as out_proj reads them. The gated norm works in place, unless its
  // backward needs what it saw.
  const Tensor joined = ctx.empty({T, c.d_inner()}, projected.dtype());
  const Tensor out = joined.slice(1, d_mlp(), c.d_inner());
  const Tensor y = tape != nullptr && c.rmsnorm ? ctx.empty(out.shape(), out.dtype()) : out;
  EdgeStates states{.initial = learnt_states(batch), .last = {}};
  if (batch.has_states()) states = edge_states(ctx, batch, batch.pool().ssm(layer), layer, "ssm", tape);
  SsdArgs args = ssd_args(batch, in, conv, states.initial);
  args.return_final_states = states.last.defined();
  args.final_states = states.last;
  args.out = batch.fold(y.view({T, H, c.headdim}));
  ssd(ctx, args);
  if (states.last) batch.scatter(ctx, states.last, batch.pool().ssm(layer));
  if (c.rmsnorm)
    rms_norm(ctx, {.x = y,
                   .weight = norm_.weight,
                   .z = in.z,
                   .eps = norm_.eps,
                   .group_size = c.d_ssm / c.ngroups,
                   .norm_before_gate = c.norm_before_gate,
                   .out = out});
  if (d_mlp() > 0) gated_silu(ctx, {.x = in.x0, .gate = in.z0, .out = joined.slice(1, 0, d_mlp())});
  if (tape != nullptr) {
    Tape::Frame& frame = tape->frame(layer, "mixer");
    frame.keep("hidden", hidden);
    frame.keep("projected", projected);
    frame.keep("convolved", convolved);
    frame.keep("joined", joined);
    if (c.rmsnorm) frame.keep("y", y);
  }
  return out_proj_(ctx, joined, sum, tape != nullptr);
}

Tensor Mamba2::step(Context& ctx, const StepInput& input, const Batch& batch, int layer) const {
  const auto& c = config_;
  const std::int64_t T = input.hidden.size(0);
  const ProjectionResult projected =
      project(ctx, input, in_proj_, step_conv(conv1d_, batch, layer, 2 * d_mlp() + c.d_ssm));
  const Projected in = split_projected(projected.out);
  const Convolved conv = split_convolved(projected.convolved);
  const Tensor joined = ctx.empty({T, c.d_inner()}, projected.out.dtype());
  const Tensor y = joined.slice(1, d_mlp(), c.d_inner());
  state_update(ctx, {.state = batch.pool().ssm(layer),
                     .x = conv.x,
                     .dt = in.dt,
                     .A = A_,
                     .B = conv.B,
                     .C = conv.C,
                     .D = by_head(D_),
                     .z = inner_gate(in.z),
                     .dt_bias = dt_bias_,
                     .state_batch_indices = batch.state_indices(),
                     .dt_softplus = true,
                     .dt_limit = c.dt_limit,
                     .out = y.view({T, nheads(), c.headdim})});
  ProjectionArgs out{.x = joined, .weight = out_proj_.weight, .bias = out_proj_.bias};
  if (c.rmsnorm) {
    ProjectionInput gated = input_of(norm_);
    gated.z = in.z;
    gated.group_size = c.d_ssm / c.ngroups;
    gated.norm_before_gate = c.norm_before_gate;
    if (d_mlp() == 0)
      out.input = gated;
    else
      rms_norm(ctx, {.x = y,
                     .weight = gated.weight,
                     .z = gated.z,
                     .eps = gated.eps,
                     .group_size = gated.group_size,
                     .norm_before_gate = gated.norm_before_gate,
                     .out = y});
  }
  if (d_mlp() > 0) gated_silu(ctx, {.x = in.x0, .gate = in.z0, .out = joined.slice(1, 0, d_mlp())});
  return projection(ctx, out).out;
}

Tensor Mamba2::backward(Context& ctx, const Tensor& dout, const Batch& batch, int layer, Tape& tape) const {
  const auto& c = config_;
  const std::int64_t T = dout.size(0);
  const Tape::Frame& frame = tape.frame(layer, "mixer");
  const Projected in = split_projected(frame["projected"]);
  const Convolved conv = split_convolved(frame["convolved"]);

  const Tensor djoined = out_proj_.backward(ctx, frame["joined"], dout);
  const Tensor dprojected = ctx.empty(frame["projected"].shape(), frame["projected"].dtype());
  const Projected din = split_projected(dprojected);
  if (d_mlp() > 0)
    gated_silu_backward(
        ctx,
        {.x = in.x0, .gate = in.z0, .dout = djoined.slice(1, 0, d_mlp()), .dx = din.x0, .dgate = din.z0});
  const Tensor dy = djoined.slice(1, d_mlp(), c.d_inner());
  if (c.rmsnorm)
    norm_backward(ctx, NormKind::rms,
                  {.x = frame["y"],
                   .weight = norm_.weight,
                   .z = in.z,
                   .eps = norm_.eps,
                   .group_size = c.d_ssm / c.ngroups,
                   .norm_before_gate = c.norm_before_gate,
                   .dout = dy,
                   .dx = dy,
                   .dz = din.z,
                   .dweight = norm_.dweight});

  const Tensor dconvolved = ctx.empty(frame["convolved"].shape(), frame["convolved"].dtype());
  const Convolved dconv = split_convolved(dconvolved);
  const Tensor dA = dA_log_ ? ctx.zeros(A_.shape()) : Tensor();
  const Tensor learnt = learnt_states(batch);
  const Tensor dlearnt = learnt && dinit_states_ ? ctx.empty(learnt.shape()) : Tensor();
  const Tensor dgate = inner_gate(din.z);
  ssd_backward(
      ctx, {.forward = ssd_args(batch, in, conv, learnt ? learnt : kept_initial_states(layer, "ssm", tape)),
            .dout = batch.fold(dy.view({T, nheads(), c.headdim})),
            .dx = batch.fold(dconv.x),
            .ddt = batch.fold(din.dt),
            .dB = batch.fold(dconv.B),
            .dC = batch.fold(dconv.C),
            .dz = dgate ? batch.fold(dgate) : Tensor(),
            .dinitial_states = dlearnt,
            .dA = dA,
            .dD = by_head(dD_),
            .ddt_bias = ddt_bias_});
  if (dA) negative_exp_backward(ctx, A_, dA, dA_log_);
  // The sum over rows is that of a bias.
  if (dlearnt)
    linear_backward(ctx, {.dout = dlearnt.view({batch.size(), -1}), .dbias = dinit_states_.view({-1})});
  short_conv_backward(ctx, conv1d_, in.xBC, Activation::silu, batch, layer, tape, dconvolved, din.xBC);
  return in_proj_.backward(ctx, frame["hidden"], dprojected);
}

bool Mamba2::describe(DecodeModel& model, DecodeLayer& layer) const {
  const auto& c = config_;
  if (d_mlp() > 0) return false;
  model.sizes.mamba2 = true;
  model.sizes.d_inner = c.d_ssm;
  model.sizes.d_state = c.d_state;
  model.sizes.heads = nheads();
  model.sizes.groups = c.ngroups;
  model.options = {.gated_norm = c.rmsnorm,
                   .norm_before_gate = c.norm_before_gate,
                   .gated_norm_eps = norm_.eps,
                   .D_by_channel = c.D_has_hdim,
                   .dt_limit = c.dt_limit};
  layer.in_weight = in_proj_.weight;
  layer.in_bias = in_proj_.bias;
  layer.conv_weight = conv1d_.weight.squeeze(1);
  layer.conv_bias = conv1d_.bias;
  layer.dt_bias = dt_bias_;
  layer.A = A_;
  layer.D = D_;
  if (c.rmsnorm) layer.gated_norm_weight = norm_.weight;
  layer.out_weight = out_proj_.weight;
  layer.out_bias = out_proj_.bias;
  return true;
}

LayerStateShape Mamba2::state_shape() const {
  return {.conv = {conv1d_.channels, config_.d_conv - 1},
          .ssm = {nheads(), config_.headdim, config_.d_state},
          .ssm_initial = init_states_};
}

void Mamba2::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  const auto& c = config_;
  const std::int64_t H = nheads();
  if (c.learnable_init_states)
    visitor({.name = prefix + ".init_states",
             .shape = {H, c.headdim, c.d_state},
             .tensor = init_states_,
             .gradient = dinit_states_,
             .no_weight_decay = true});
  const auto small = [&](const char* name, const Dims& shape, Tensor& tensor, Tensor& gradient) {
    visitor({.name = prefix + name,
             .shape = shape,
             .tensor = tensor,
             .gradient = gradient,
             .no_weight_decay = true});
  };
  small(".dt_bias", {H}, dt_bias_, ddt_bias_);
  small(".A_log", {H}, A_log_, dA_log_);
  small(".D", {c.D_has_hdim ? c.d_ssm : H}, D_, dD_);
  in_proj_.visit(prefix + ".in_proj", visitor);
  conv1d_.visit(prefix + ".conv1d", visitor);
  if (c.rmsnorm) norm_.visit(prefix + ".norm", visitor);
  out_proj_.visit(prefix + ".out_proj", visitor);
}

void Mamba2::initialize(Rng& rng) {
  const auto& c = config_;
  krait::initialize(in_proj_, rng);
  krait::initialize(conv1d_, rng);
  if (c.conv_init)
    conv1d_.weight = uniform(rng, {conv1d_.channels, 1, c.d_conv}, -*c.conv_init, *c.conv_init);
  if (c.learnable_init_states) init_states_ = constant({nheads(), c.headdim, c.d_state}, 0.0);
  dt_bias_ = initial_dt_bias(rng, nheads(), c.dt_min, c.dt_max, c.dt_init_floor);
  A_log_ = uniform(rng, {nheads()}, c.A_init_range.first, c.A_init_range.second);
  for (float& value : A_log_.span<float>()) value = std::log(value);
  D_ = constant({c.D_has_hdim ? c.d_ssm : nheads()}, 1.0);
  if (c.rmsnorm) krait::initialize(norm_);
  krait::initialize(out_proj_, rng);
}

void Mamba2::prepare(Context& ctx) { A_ = negative_exp(ctx, A_log_); }

Mamba2Simple::Mamba2Simple(const Mamba2SimpleConfig& config) : Mamba2(from_simple(config)) {}

}  // namespace krait
