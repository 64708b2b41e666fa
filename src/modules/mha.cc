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
  Tensor out = ctx.empty(q.shape(), q.dtype());
  for (std::int64_t i = 0; i < batch.size(); ++i) {
    const std::int64_t begin = batch.begin(i);
    const std::int64_t end = batch.end(i);
    const std::int64_t seen = pool.position(batch.row(i));
    const Tensor cache = pool.kv(layer, batch.row(i), seen + end - begin);  // (length, 2, Hkv, head_dim)
    const Tensor keys = cache.select(1, 0);
    const Tensor values = cache.select(1, 1);
    ctx.copy(k.slice(0, begin, end), keys.slice(0, seen, seen + end - begin));
    ctx.copy(v.slice(0, begin, end), values.slice(0, seen, seen + end - begin));
    attention(ctx, {.q = q.slice(0, begin, end),
                    .k = keys,
                    .v = values,
                    .causal = causal,
                    .scale = scale,
                    .out = out.slice(0, begin, end)});
  }
  return out;
}

Tensor document_attention(Context& ctx, const Tensor& q, const Tensor& k, const Tensor& v, const Batch& batch,
                          double scale, bool causal, Tape::Frame& frame) {
  require(!batch.has_states(), "attention layers cannot carry states from segment to segment in training");
  Tensor out = ctx.zeros(q.shape(), q.dtype());  // 0 where seq_idx is -1
  Tensor logsumexp = ctx.zeros({q.size(0), q.size(1)});
  for (const auto& [begin, end] : batch.pieces())
    attention(ctx, {.q = q.slice(0, begin, end),
                    .k = k.slice(0, begin, end),
                    .v = v.slice(0, begin, end),
                    .causal = causal,
                    .scale = scale,
                    .out = out.slice(0, begin, end),
                    .logsumexp = logsumexp.slice(0, begin, end)});
  frame.keep("q", q);
  frame.keep("k", k);
  frame.keep("v", v);
  frame.keep("attended", out);
  frame.keep("logsumexp", logsumexp);
  return out;
}

void document_attention_backward(Context& ctx, const Tensor& dout, const Batch& batch, double scale,
                                 bool causal, const Tape::Frame& frame, const Tensor& dq, const Tensor& dk,
                                 const Tensor& dv) {
  if (batch.seq_idx())
    for (const Tensor& gradient : {dq, dk, dv}) ctx.fill(gradient, 0.0);
  for (const auto& [begin, end] : batch.pieces())
    attention_backward(ctx, {.q = frame["q"].slice(0, begin, end),
                             .k = frame["k"].slice(0, begin, end),
                             .v = frame["v"].slice(0, begin, end),
                             .causal = causal,
                             .scale = scale,
                             .out = frame["attended"].slice(0, begin, end),
                             .logsumexp = frame["logsumexp"].slice(0, begin, end),
                             .dout = dout.slice(0, begin, end),
                             .dq = dq.slice(0, begin, end),
                             .dk = dk.slice(0, begin, end),
                             .dv = dv.slice(0, begin, end)});
}

Mha::Heads Mha::split_heads(const Tensor& qkv) const {
  const auto& c = config_;
  const std::int64_t T = qkv.size(0);
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t kv_dim = c.num_heads_kv * c.head_dim;
  return {.q = qkv.slice(1, 0, q_dim).view({T, c.num_heads, c.head_dim}),
          .k = qkv.slice(1, q_dim, q_dim + kv_dim).view({T, c.num_heads_kv, c.head_dim}),
          .v = qkv.slice(1, q_dim + kv_dim, qkv_dim()).view({T, c.num_heads_kv, c.head_dim})};
}

void Mha::turn(Context& ctx, const Heads& heads, const Batch& batch, bool inverse) const {
  if (config_.rotary_emb_dim == 0) return;
  for (const Tensor& turned : {heads.q, heads.k})
    rotary_embedding(ctx, {.x = turned,
                           .positions = batch.positions(),
                           .dim = config_.rotary_emb_dim,
                           .base = config_.rotary_emb_base,
                           .interleaved = config_.rotary_emb_interleaved,
                           .inverse = inverse});
}

Tensor Mha::forward(Context& ctx, const Tensor& hidden, const Batch& batch, int layer, Tape* tape,
                    Tensor* sum) const {
  const auto& c = config_;
  const std::int64_t T = hidden.size(0);
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t half_mlp = c.mlp_dim / 2;

  const Tensor projected = in_proj_(ctx, hidden);
  Tensor qkv = projected.slice(1, 0, qkv_dim());
  // The window holds the convolution's inputs, as for an SSM, so that a step continues a prefill.
  if (c.d_conv > 0) qkv = short_conv(ctx, conv1d_, qkv, Activation::none, batch, layer, tape);
  const Heads heads = split_heads(qkv);
  turn(ctx, heads, batch, false);
  Tape::Frame* frame = tape != nullptr ? &tape->frame(layer, "mixer") : nullptr;
  const Tensor attended =
      frame != nullptr
          ? document_attention(ctx, heads.q, heads.k, heads.v, batch, c.softmax_scale, c.causal, *frame)
          : cached_attention(ctx, heads.q, heads.k, heads.v, batch, layer, c.softmax_scale, c.causal);

  Tensor joined = attended.view({T, q_dim});
  if (half_mlp > 0) {
    joined = ctx.empty({T, q_dim + half_mlp}, projected.dtype());
    ctx.copy(attended.view({T, q_dim}), joined.slice(1, 0, q_dim));
    gated_silu(ctx, {.x = projected.slice(1, qkv_dim(), qkv_dim() + half_mlp),
                     .gate = projected.slice(1, qkv_dim() + half_mlp, qkv_dim() + 2 * half_mlp),
                     .out = joined.slice(1, q_dim, q_dim + half_mlp)});
  }
  if (frame != nullptr) {
    frame->keep("hidden", hidden);
    frame->keep("projected", projected);
    frame->keep("joined", joined);
  }
  return out_proj_(ctx, joined, sum, tape != nullptr);
}

Tensor Mha::backward(Context& ctx, const Tensor& dout, const Batch& batch, int layer, Tape& tape) const {
  const auto& c = config_;
  const std::int64_t T = dout.size(0);
  const std::int64_t q_dim = c.num_heads * c.head_dim;
  const std::int64_t half_mlp = c.mlp_dim / 2;
  const Tape::Frame& frame = tape.frame(layer, "mixer");
  const Tensor& projected = frame["projected"];

  const Tensor djoined = out_proj_.backward(ctx, frame["joined"], dout);
  const Tensor dprojected = ctx.empty(projected.shape(), projected.dtype());
  if (half_mlp > 0)
    gated_silu_backward(ctx, {.x = projected.slice(1, qkv_dim(), qkv_dim() + half_mlp),
                              .gate = projected.slice(1, qkv_dim() + half_mlp, qkv_dim() + 2 * half_mlp),
                              .dout = djoined.slice(1, q_dim, q_dim + half_mlp),
                              .dx = dprojected.slice(1, qkv_dim(), qkv_dim() + half_mlp),
                              .dgate = dprojected.slice(1, qkv_dim() + half_mlp, qkv_dim() + 2 * half_mlp)});

  const Tensor dqkv = dprojected.slice(1, 0, qkv_dim());
  const Tensor dconvolved = c.d_conv > 0 ? ctx.empty(dqkv.shape(), dqkv.dtype()) : dqkv;
  const Heads dheads = split_heads(dconvolved);
  document_attention_backward(ctx, djoined.slice(1, 0, q_dim).view({T, c.num_heads, c.head_dim}), batch,
                              c.softmax_scale, c.causal, frame, dheads.q, dheads.k, dheads.v);
  turn(ctx, dheads, batch, true);
  if (c.d_conv > 0)
    short_conv_backward(ctx, conv1d_, projected.slice(1, 0, qkv_dim()), Activation::none, batch, layer, tape,
                        dconvolved, dqkv);
  return in_proj_.backward(ctx, frame["hidden"], dprojected);
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
