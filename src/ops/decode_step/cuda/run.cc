// decode_step on a GPU: whether the kernel takes what it is given, and what it is told.
#include <memory>
#include <vector>

#include "core/cuda/backend.h"
#include "ops/decode_step/cuda/params.h"
#include "ops/decode_step/kernels.h"

namespace krait::decode_detail {
namespace {

#ifndef __HIP_PLATFORM_AMD__

// Of `dtype` on the device, `shape`, without gaps, at a multiple of 16 bytes.
bool lies(const Context& ctx, const Tensor& t, DType dtype, const Dims& shape) {
  return t && t.device() == ctx.device() && t.dtype() == dtype && t.shape() == shape && t.is_contiguous() &&
         reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0;
}
bool may_lie(const Context& ctx, const Tensor& t, const Dims& shape) {
  return !t || lies(ctx, t, DType::f32, shape);
}

bool fits(const Context& ctx, const DecodeStepArgs& args, DType dtype) {
  const DecodeModel& model = args.model;
  const DecodeSizes& s = model.sizes;
  if (dtype != DType::f16 && dtype != DType::bf16) return false;
  if (!lies(ctx, args.id, DType::i64, {1}) || !lies(ctx, args.row, DType::i64, {1})) return false;
  for (const Tensor* table : {&args.embedding, &args.head})
    if (!lies(ctx, *table, dtype, {s.vocabulary, s.d_model})) return false;
  if (!may_lie(ctx, args.norm_weight, {s.d_model}) || !may_lie(ctx, args.norm_bias, {s.d_model}))
    return false;
  if (!lies(ctx, args.logits, DType::f32, {1, s.vocabulary})) return false;
  if (model.layers.size() != static_cast<std::size_t>(s.layers)) return false;
  const std::int64_t scalars = s.mamba2 ? s.heads : s.d_inner;
  const std::int64_t low = s.dt_rank + 2 * s.d_state;
  const std::int64_t channels = conv_channels(s);
  const DecodeLayer& first = model.layers[0];
  if (!first.ssm_state || !first.conv_state || first.conv_state.ndim() != 3) return false;
  const DType state_dtype = first.ssm_state.dtype();
  if (state_dtype != DType::f32 && state_dtype != DType::f16 && state_dtype != DType::bf16) return false;
  const std::int64_t rows = first.ssm_state.size(0);
  for (const DecodeLayer& l : model.layers) {
    if (!lies(ctx, l.in_weight, dtype, {in_rows(s), s.d_model}) ||
        !lies(ctx, l.out_weight, dtype, {s.d_model, s.d_inner}) ||
        !lies(ctx, l.conv_weight, DType::f32, {channels, 4}))
      return false;
    if (!s.mamba2 && (!lies(ctx, l.x_weight, dtype, {low, s.d_inner}) ||
                      !lies(ctx, l.dt_weight, dtype, {s.d_inner, s.dt_rank})))
      return false;
    if (!lies(ctx, l.A, DType::f32, s.mamba2 ? Dims{s.heads} : Dims{s.d_inner, s.d_state})) return false;
    if (!may_lie(ctx, l.norm_weight, {s.d_model}) || !may_lie(ctx, l.norm_bias, {s.d_model}) ||
        !may_lie(ctx, l.in_bias, {in_rows(s)}) || !may_lie(ctx, l.conv_bias, {channels}) ||
        !may_lie(ctx, l.dt_bias, {scalars}) || !may_lie(ctx, l.out_bias, {s.d_model}) ||
        !may_lie(ctx, l.D, {s.mamba2 && !model.options.D_by_channel ? s.heads : s.d_inner}) ||
        !may_lie(ctx, l.gated_norm_weight, {s.d_inner}))
      return false;
    const Dims ssm =
        s.mamba2 ? Dims{rows, s.heads, s.d_inner / s.heads, s.d_state} : Dims{rows, s.d_inner, s.d_state};
    if (!lies(ctx, l.ssm_state, state_dtype, ssm)) return false;
    const Tensor& conv = l.conv_state;
    if (!conv || conv.device() != ctx.device() || conv.dtype() != DType::f32 ||
        conv.shape() != Dims{rows, channels, 3} || conv.strides() != first.conv_state.strides())
      return false;
  }
  return true;
}

// Words and the count of layers so far. A larger model gets new ones; recordings may still use the old.
struct Workspace {
  std::vector<Tensor> tensors;  // f64 as 8 bytes each, the last the largest
};
constexpr std::int64_t kFront = 16;  // words in front of the first, for the count

Tensor words_of(Context& ctx, std::int64_t count) {
  static const char key = 0;
  std::shared_ptr<void>& slot = ctx.attachment(&key);
  if (!slot) slot = std::make_shared<Workspace>();
  std::vector<Tensor>& tensors = static_cast<Workspace*>(slot.get())->tensors;
  if (tensors.empty() || tensors.back().size(0) < kFront + count)
    tensors.push_back(ctx.zeros({kFront + count}, DType::i64));
  return tensors.back();
}

Params params_of(Context& ctx, const DecodeStepArgs& args, const DecodePlan& plan) {
  const DecodeModel& model = args.model;
  const DecodeSizes& s = model.sizes;
  const DecodeOptions& o = model.options;
  const auto size = [](std::int64_t n) { return static_cast<int>(n); };
  const auto floats = [](const Tensor& t) { return t ? t.data<float>() : nullptr; };
  const DecodeLayer& first = model.layers[0];
  Params p{};
  p.layers = size(s.layers);
  p.d_model = size(s.d_model);
  p.d_inner = size(s.d_inner);
  p.d_state = size(s.d_state);
  p.in_rows = size(in_rows(s));
  p.conv_first = s.mamba2 ? size(s.d_inner) : 0;
  p.conv_channels = size(conv_channels(s));
  p.vocabulary = size(s.vocabulary);
  p.model_share = 1.0F / static_cast<float>(s.d_model);
  p.group_share = static_cast<float>(s.groups) / static_cast<float>(s.d_inner);
  p.model_steps = steps_of(s.d_model);
  p.inner_steps = steps_of(s.d_inner);
  p.model_tile = plan.model_tile;
  p.inner_tile = plan.inner_tile;
  p.state_tile = plan.state_tile;
  p.ring = plan.ring;
  p.piece_shift = plan.piece_shift;
  p.in_flight = plan.in_flight;
  p.heads = s.mamba2 ? size(s.heads) : 0;
  p.headdim = s.mamba2 ? size(s.d_inner / s.heads) : 1;
  p.heads_per_group = s.mamba2 ? size(s.heads / s.groups) : 1;
  p.groups = size(s.groups);
  p.dt_rank = size(s.dt_rank);
  p.rms = model.rms;
  p.gated_norm = o.gated_norm;
  p.norm_before_gate = o.norm_before_gate;
  p.D_by_channel = o.D_by_channel;
  p.mixer_norm = o.mixer_norm_eps.has_value();
  p.eps = static_cast<float>(model.eps);
  p.gated_norm_eps = static_cast<float>(o.gated_norm_eps);
  p.mixer_norm_eps = static_cast<float>(o.mixer_norm_eps.value_or(0.0));
  p.dt_low = o.dt_limit.low;
  p.dt_high = o.dt_limit.high;
  p.state_dtype = first.ssm_state.dtype();
  p.id = args.id.data<std::int64_t>();
  p.row = args.row.data<std::int64_t>();
  p.state_rows = first.ssm_state.size(0);
  for (int i = 0; i < 3; ++i) p.conv_stride[i] = first.conv_state.stride(i);
  p.ssm_stride = first.ssm_state.stride(0);
  p.embedding = args.embedding.raw();
  p.norm_weight = floats(args.norm_weight);
  p.norm_bias = floats(args.norm_bias);
  p.head = args.head.raw();
  p.logits = args.logits.data<float>();

  auto* const memory = reinterpret_cast<std::uint64_t*>(words_of(ctx, word_count(s)).raw());
  p.epoch = reinterpret_cast<unsigned*>(memory);
  std::uint64_t* next = memory + kFront;
  const auto take = [&](std::int64_t values) {
    std::uint64_t* const words = next;
    next += words_for(values);
    return words;
  };
  p.words = {.projected = take(in_rows(s)),
             .low = take(s.mamba2 ? 0 : s.dt_rank + 2 * s.d_state),
             .y = take(s.d_inner),
             .hidden = take(s.d_model)};
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const DecodeLayer& l = model.layers[i];
    p.layer[i] = {.norm_weight = floats(l.norm_weight),
                  .norm_bias = floats(l.norm_bias),
                  .in_weight = l.in_weight.raw(),
                  .in_bias = floats(l.in_bias),
                  .conv_weight = floats(l.conv_weight),
                  .conv_bias = floats(l.conv_bias),
                  .conv_state = l.conv_state.data<float>(),
                  .x_weight = s.mamba2 ? nullptr : l.x_weight.raw(),
                  .dt_weight = s.mamba2 ? nullptr : l.dt_weight.raw(),
                  .dt_bias = floats(l.dt_bias),
                  .A = floats(l.A),
                  .D = floats(l.D),
                  .ssm_state = l.ssm_state.raw(),
                  .gated_norm_weight = floats(l.gated_norm_weight),
                  .out_weight = l.out_weight.raw(),
                  .out_bias = floats(l.out_bias)};
  }
  return p;
}

#endif

}  // namespace

bool run(Context& ctx, const DecodeStepArgs& args) {
#ifdef __HIP_PLATFORM_AMD__
  static_cast<void>(ctx);
  static_cast<void>(args);
  return false;
#else
  if (!cuda::has_warpgroup_products(ctx)) return false;
  const cuda::DeviceLimits& limits = cuda::limits_of(ctx);
  const DecodePlan plan = choose_decode_plan(args.model.sizes, kMostLayers, limits.multiprocessors,
                                             limits.shared_memory_per_block);
  const DType dtype = args.embedding.dtype();
  if (plan.blocks == 0 || !fits(ctx, args, dtype)) return false;
  const Params params = params_of(ctx, args, plan);
  args.model.sizes.mamba2 ? launch_mamba2(ctx, dtype, plan, params) : launch_mamba1(ctx, dtype, plan, params);
  return true;
#endif
}

}  // namespace krait::decode_detail
