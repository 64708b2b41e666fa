#include "krait/modules/mha.h"

#include "krait/core/error.h"
#include "krait/ops/activation.h"
#include "krait/ops/attention.h"
#include "krait/ops/rotary.h"
#include "modules/initialize.h"
#include "modules/short_conv.h"

namespace krait {
namespace {

MhaConfig complete(MhaConfig c) {
  require(c.d_model > 0 && c.num_heads > 0, "MHA: d_model ", c.d_model, ", num_heads ", c.num_heads,
          ": each must be positive");
  if (c.num_heads_kv == 0) c.num_heads_kv = c.num_heads;
  if (c.head_dim == 0) {
    require(c.d_model % c.num_heads == 0, "MHA: d_model ", c.d_model, " is not a multiple of num_heads ",
            c.num_heads);
    c.head_dim = c.d_model / c.num_heads;
  }
  require(c.num_heads_kv > 0 && c.num_heads % c.num_heads_kv == 0, "MHA: num_heads ", c.num_heads,
          " is not a multiple of num_heads_kv ", c.num_heads_kv);
  require(c.head_dim > 0 && c.mlp_dim >= 0 && c.d_conv >= 0, "MHA: head_dim ", c.head_dim, ", mlp_dim ",
          c.mlp_dim, ", d_conv ", c.d_conv, ": negative or zero");
  require(c.rotary_emb_dim >= 0 && c.rotary_emb_dim <= c.head_dim && c.rotary_emb_dim % 2 == 0,
          "MHA: rotary_emb_dim is ", c.rotary_emb_dim, ", expected an even number up to head_dim ",
          c.head_dim);
  constexpr std::int64_t kMlpMultiple = 256;
  c.mlp_dim = (c.mlp_dim + kMlpMultiple - 1) / kMlpMultiple * kMlpMultiple;
  return c;
}

}  // namespace

Mha::Mha(const MhaConfig& config) : config_(complete(config)) {
  const auto& c = config_;
  in_proj_ = {.in = c.d_model, .out = qkv_dim() + c.mlp_dim, .has_bias = c.qkv_proj_bias};
  conv1d_ = {.channels = qkv_dim(), .d_conv = c.d_conv};
  out_proj_ = {.in = c.head_dim * c.num_heads + c.mlp_dim / 2, .out = c.d_model, .has_bias = c.out_proj_bias};
}

Tensor cached_attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Batch& batch,
                        int layer, double scale, bool causal) {
  StatePool& pool = batch.pool();
  Tensor out = ctx.empty(q.shape());
  for (std::int64_t i = 0; i < batch.size(); ++i) {
    const std::int64_t begin = batch.begin(i);
    const std::int64_t end = batch.end(i);
    const std::int64_t seen = pool.position(batch.row(i));
    const Tensor cache = pool.kv(layer, batch.row(i), seen + end - begin);  // (length, 2, Hkv, head_dim)
    const Tensor keys = cache.select(1, 0);
    const Tensor values = cache.select(1, 1);
    keys.slice(0, seen, seen + end - begin).copy_from(k.slice(0, begin, end));
    values.slice(0, seen, seen + end - begin).copy_from(v.slice(0, begin, end));
    attention(ctx, {.q = q.slice(0, begin, end),
                    .k = keys,
                    .v = values,
                    .causal = causal,
                    .scale = scale,
                    .out = out.slice(0, begin, end)});
  }
  return out;
}

Tensor Mha::forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer) const {
  const auto& c = config_;
  const std::int64_t T = hidden.size(0);
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t kv_dim = c.num_heads_kv * c.head_dim;
  const std::int64_t half_mlp = c.mlp_dim / 2;

  const Tensor projected = in_proj_(ctx, hidden);
  Tensor qkv = projected.slice(1, 0, qkv_dim());
  // The window holds the convolution's inputs, as for an SSM, so that a step continues a prefill.
  if (c.d_conv > 0) qkv = short_conv(ctx, conv1d_, qkv, Activation::none, batch, layer);
  const Tensor q = qkv.slice(1, 0, q_dim).view({T, c.num_heads, c.head_dim});
  const Tensor k = qkv.slice(1, q_dim, q_dim + kv_dim).view({T, c.num_heads_kv, c.head_dim});
  const Tensor v = qkv.slice(1, q_dim + kv_dim, qkv_dim()).view({T, c.num_heads_kv, c.head_dim});
  if (c.rotary_emb_dim > 0)
    for (const Tensor& turned : {q, k})
      rotary_embedding(ctx, {.x = turned,
                             .positions = batch.positions(),
                             .dim = c.rotary_emb_dim,
                             .base = c.rotary_emb_base,
                             .interleaved = c.rotary_emb_interleaved});
  const Tensor context =
      cached_attention(ctx, q, k, v, batch, layer, c.softmax_scale, c.causal).view({T, q_dim});
  if (half_mlp == 0) return out_proj_(ctx, context);

  Tensor joined = ctx.empty({T, q_dim + half_mlp});
  joined.slice(1, 0, q_dim).copy_from(context);
  gated_silu(ctx, {.x = projected.slice(1, qkv_dim(), qkv_dim() + half_mlp),
                   .gate = projected.slice(1, qkv_dim() + half_mlp, qkv_dim() + 2 * half_mlp),
                   .out = joined.slice(1, q_dim, q_dim + half_mlp)});
  return out_proj_(ctx, joined);
}

LayerStateShape Mha::state_shape() const {
  return {.conv = config_.d_conv > 0 ? Dims{qkv_dim(), config_.d_conv - 1} : Dims{},
          .ssm = {},
          .kv = {2, config_.num_heads_kv, config_.head_dim}};
}

void Mha::visit(const std::string& prefix, const ParameterVisitor& visitor) {
  in_proj_.visit(prefix + ".in_proj", visitor);
  if (config_.d_conv > 0) conv1d_.visit(prefix + ".conv1d", visitor);
  out_proj_.visit(prefix + ".out_proj", visitor);
}

void Mha::initialize(Rng& rng) {
  krait::initialize(in_proj_, rng);
  if (config_.d_conv > 0) krait::initialize(conv1d_, rng);
  krait::initialize(out_proj_, rng);
}

}  // namespace krait
