#include "krait/modules/mamba2.h"

#include <cmath>

#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "krait/ops/norm.h"
#include "krait/ops/ssd.h"
#include "modules/initialize.h"
#include "modules/short_conv.h"

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

Tensor Mamba2::forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer) const {
  const auto& c = config_;
  const std::int64_t T = hidden.size(0);
  const std::int64_t H = nheads();
  const std::int64_t GN = c.ngroups * c.d_state;

  const Tensor projected = in_proj_(ctx, hidden);
  std::int64_t at = 0;
  const auto next = [&at](const Tensor& t, std::int64_t width) {
    at += width;
    return t.slice(1, at - width, at);
  };
  const Tensor z0 = next(projected, d_mlp());
  const Tensor x0 = next(projected, d_mlp());
  const Tensor z = next(projected, c.d_ssm);
  const Tensor xBC = next(projected, c.d_ssm + 2 * GN);
  const Tensor dt = next(projected, H);

  const Tensor convolved = short_conv(ctx, conv1d_, xBC, Activation::silu, batch, layer);
  at = 0;
  const Tensor x = next(convolved, c.d_ssm).view({T, H, c.headdim});
  const Tensor B = next(convolved, GN).view({T, c.ngroups, c.d_state});
  const Tensor C = next(convolved, GN).view({T, c.ngroups, c.d_state});
  const Tensor D = c.D_has_hdim ? D_.view({H, c.headdim}) : D_;
  // Without the gated norm, z gates inside the recurrence.
  const Tensor inner_z = c.rmsnorm ? Tensor() : z.view({T, H, c.headdim});

  // The SSM's output beside the MLP's, as out_proj reads them.
  Tensor joined = ctx.empty({T, c.d_inner()});
  Tensor y = joined.slice(1, d_mlp(), c.d_inner());
  const Tensor& pooled = batch.pool().ssm(layer);
  if (batch.is_step()) {
    state_update(ctx, {.state = pooled,
                       .x = x,
                       .dt = dt,
                       .A = A_,
                       .B = B,
                       .C = C,
                       .D = D,
                       .z = inner_z,
                       .dt_bias = dt_bias_,
                       .state_batch_indices = batch.state_indices(),
                       .dt_softplus = true,
                       .dt_limit = c.dt_limit,
                       .out = y.view({T, H, c.headdim})});
  } else {
    const Tensor states = batch.gather(ctx, pooled);
    ssd(ctx, {.x = x.unsqueeze(0),
              .dt = dt.unsqueeze(0),
              .A = A_,
              .B = B.unsqueeze(0),
              .C = C.unsqueeze(0),
              .D = D,
              .z = inner_z ? inner_z.unsqueeze(0) : Tensor(),
              .dt_bias = dt_bias_,
              .initial_states = states,
              .cu_seqlens = batch.cu_seqlens(),
              .dt_softplus = true,
              .dt_limit = c.dt_limit,
              .return_final_states = true,
              .out = y.view({1, T, H, c.headdim}),
              .final_states = states});
    batch.scatter(states, pooled);
  }
  if (c.rmsnorm)
    rms_norm(ctx, {.x = y,
                   .weight = norm_.weight,
                   .z = z,
                   .eps = norm_.eps,
                   .group_size = c.d_ssm / c.ngroups,
                   .norm_before_gate = c.norm_before_gate,
                   .out = y});
  if (d_mlp() > 0) gated_silu(ctx, {.x = x0, .gate = z0, .out = joined.slice(1, 0, d_mlp())});
  return out_proj_(ctx, joined);
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
             .no_weight_decay = true});
  visitor({.name = prefix + ".dt_bias", .shape = {H}, .tensor = dt_bias_, .no_weight_decay = true});
  visitor({.name = prefix + ".A_log", .shape = {H}, .tensor = A_log_, .no_weight_decay = true});
  visitor(
      {.name = prefix + ".D", .shape = {c.D_has_hdim ? c.d_ssm : H}, .tensor = D_, .no_weight_decay = true});
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
  prepare();
}

void Mamba2::prepare() { A_ = negative_exp(A_log_); }

Mamba2Simple::Mamba2Simple(const Mamba2SimpleConfig& config) : Mamba2(from_simple(config)) {}

}  // namespace krait
