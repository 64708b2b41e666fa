#include "krait/modules/mamba1.h"

#include <cmath>

#include "krait/core/error.h"
#include "krait/ops/norm.h"
#include "krait/ops/selective_scan.h"
#include "krait/ops/state_update.h"
#include "modules/initialize.h"
#include "modules/short_conv.h"

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

Tensor Mamba1::forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer) const {
  const auto& c = config_;
  const Tensor xz = in_proj_(ctx, hidden);
  const Tensor x = short_conv(ctx, conv1d_, xz.slice(1, 0, c.d_inner), Activation::silu, batch, layer);
  const Tensor z = xz.slice(1, c.d_inner, 2 * c.d_inner);

  const Tensor dt_B_C = x_proj_(ctx, x);
  Tensor dt = dt_B_C.slice(1, 0, c.dt_rank);
  Tensor B = dt_B_C.slice(1, c.dt_rank, c.dt_rank + c.d_state);
  Tensor C = dt_B_C.slice(1, c.dt_rank + c.d_state, c.dt_rank + 2 * c.d_state);
  if (c.mixer_rms_eps)
    for (Tensor* part : {&dt, &B, &C}) rms_norm(ctx, {.x = *part, .eps = *c.mixer_rms_eps, .out = *part});
  // The bias of dt_proj is added inside the scan, in front of the softplus.
  const Tensor delta = LinearLayer{.in = c.dt_rank, .out = c.d_inner, .weight = dt_proj_.weight}(ctx, dt);

  const Tensor& pooled = batch.pool().ssm(layer);
  Tensor y = ctx.empty(x.shape());
  if (batch.is_step()) {
    state_update(ctx, {.state = pooled,
                       .x = x,
                       .dt = delta,
                       .A = A_,
                       .B = B,
                       .C = C,
                       .D = D_,
                       .z = z,
                       .dt_bias = dt_proj_.bias,
                       .state_batch_indices = batch.state_indices(),
                       .dt_softplus = true,
                       .out = y});
  } else {
    const auto channels_first = [](const Tensor& t) { return t.transpose(0, 1).unsqueeze(0); };
    const Tensor states = batch.gather(ctx, pooled);
    selective_scan(ctx, {.u = channels_first(x),
                         .delta = channels_first(delta),
                         .A = A_,
                         .B = channels_first(B),
                         .C = channels_first(C),
                         .D = D_,
                         .z = channels_first(z),
                         .delta_bias = dt_proj_.bias,
                         .initial_state = states,
                         .cu_seqlens = batch.cu_seqlens(),
                         .delta_softplus = true,
                         .return_last_state = true,
                         .out = channels_first(y),
                         .last_state = states});
    batch.scatter(states, pooled);
  }
  return out_proj_(ctx, y);
}

LayerStateShape Mamba1::state_shape() const {
  return {.conv = {config_.d_inner, config_.d_conv - 1}, .ssm = {config_.d_inner, config_.d_state}};
}

void Mamba1::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  const auto& c = config_;
  visitor({.name = prefix + ".A_log",
           .shape = {c.d_inner, c.d_state},
           .tensor = A_log_,
           .no_weight_decay = true});
  visitor({.name = prefix + ".D", .shape = {c.d_inner}, .tensor = D_, .no_weight_decay = true});
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
  prepare();
}

void Mamba1::prepare() { A_ = negative_exp(A_log_); }

}  // namespace krait
