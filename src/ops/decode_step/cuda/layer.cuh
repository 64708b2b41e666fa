// What layers of both mixers share: in_proj with its norm and convolution, out_proj, and states.
#pragma once

#include "ops/decode_step/cuda/stages.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

namespace krait::decode_detail {

// -1: a padding slot.
__device__ __forceinline__ std::int64_t state_row(const Params& p) {
  const std::int64_t row = *p.row;
  return row >= 0 && row < p.state_rows ? row : -1;
}
// The first of the states of a layer's channels from `channel` on, of a padding slot those of row 0.
__device__ __forceinline__ std::int64_t first_state(const Params& p, std::int64_t row, int channel) {
  return max(row, std::int64_t{0}) * p.ssm_stride + std::int64_t{channel} * p.d_state;
}

// A row of in_proj, of a thread: a convolution of 4 taps follows where it has a channel.
struct ConvRow {
  int channel = -1;
  std::int64_t window = 0;  // of the channel, in the layer's conv_state
  float4 taps{};
  float bias = 0.0F;
  float before[3] = {};
  float product_bias = 0.0F;
};

template <typename T, bool kKnown>
class InProjection {
 public:
  __device__ InProjection(const Params& p, Share rows, std::int64_t state_row)
      : p_(p), rows_(rows), state_row_(state_row) {}

  // Row `i` of the block's, which may be beyond its last one.
  [[nodiscard]] __device__ __forceinline__ ConvRow row(int i) const {
    ConvRow e;
    const int channel = rows_.first + i - p_.conv_first;
    if (i >= rows_.count || channel < 0 || channel >= p_.conv_channels) return e;
    e.channel = channel;
    e.window = state_row_ * p_.conv_stride[0] + channel * p_.conv_stride[1];
    return e;
  }
  // What `load` will read, for all rows of a block.
  static __device__ __forceinline__ void announce(const Params& p, const LayerPointers& layer, Share rows,
                                                  std::int64_t state_row) {
    const int first = max(rows.first, p.conv_first) - p.conv_first;
    const int count = min(rows.first + rows.count, p.conv_first + p.conv_channels) - p.conv_first - first;
    Producer::announce(layer.in_bias, rows.first, rows.count);
    if (count <= 0) return;
    Producer::announce(layer.conv_weight, std::int64_t{first} * 4, count * 4);
    Producer::announce(layer.conv_bias, first, count);
    if (state_row < 0 || p.conv_stride[1] != 1) return;
    for (int k = 0; k < 3; ++k)
      Producer::announce(layer.conv_state, state_row * p.conv_stride[0] + k * p.conv_stride[2] + first,
                         count);
  }
  // What row `i` needs of a layer beside its sum.
  __device__ __forceinline__ void load(const LayerPointers& layer, int i, ConvRow& e) const {
    if (!kKnown && layer.in_bias != nullptr && i < rows_.count)
      e.product_bias = __ldg(layer.in_bias + rows_.first + i);
    if (e.channel < 0) return;
    e.taps = __ldg(reinterpret_cast<const float4*>(layer.conv_weight) + e.channel);
    if (kKnown || layer.conv_bias != nullptr) e.bias = __ldg(layer.conv_bias + e.channel);
    if (state_row_ < 0) return;
    const float* from = layer.conv_state + e.window;
#pragma unroll
    for (int k = 0; k < 3; ++k) e.before[k] = from[k * p_.conv_stride[2]];
  }
  __device__ __forceinline__ void finish(const LayerPointers& layer, const ConvRow& e, int i, bool there,
                                         float sum, unsigned epoch) const {
    const float now = rounded<T>(sum + e.product_bias);
    float value = now;
    if (e.channel >= 0) {
      float y = fmaf(e.taps.x, e.before[0], e.bias);
      y = fmaf(e.taps.y, e.before[1], y);
      y = fmaf(e.taps.z, e.before[2], y);
      y = fmaf(e.taps.w, now, y);
      value = state_row_ >= 0 ? cuda::quick_silu(y) : 0.0F;
    }
    publish<T>(p_.words.projected, rows_.first + i, there, value, epoch);
    if (e.channel >= 0 && state_row_ >= 0) {
      float* const to = layer.conv_state + e.window;
      to[0] = e.before[1];
      to[p_.conv_stride[2]] = e.before[2];
      to[2 * p_.conv_stride[2]] = now;
    }
  }

 private:
  const Params& p_;
  Share rows_;
  std::int64_t state_row_;
};

// Four states of a channel, in f32 or 16 bits.
__device__ __forceinline__ float4 load_states(const void* from, std::int64_t at, DType dtype) {
  if (dtype == DType::f32) return *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
  const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const std::uint16_t*>(from) + at);
  float v[4];
  dtype == DType::f16 ? widen<__half>(bits, v) : widen<__nv_bfloat16>(bits, v);
  return {v[0], v[1], v[2], v[3]};
}
__device__ __forceinline__ void store_states(void* to, std::int64_t at, DType dtype, float4 v) {
  if (dtype == DType::f32) {
    __stcg(reinterpret_cast<float4*>(static_cast<float*>(to) + at), v);
    return;
  }
  const auto pack = [&](float low, float high) {
    return dtype == DType::f16 ? bits_of<__half>(low) | bits_of<__half>(high) << 16
                               : bits_of<__nv_bfloat16>(low) | bits_of<__nv_bfloat16>(high) << 16;
  };
  *reinterpret_cast<uint2*>(static_cast<std::uint16_t*>(to) + at) = uint2{pack(v.x, v.y), pack(v.z, v.w)};
}

// The embedding of the token, as the words of out_proj would be; zeros for an id outside of the vocabulary.
template <typename T, int kQuads>
__device__ __forceinline__ void read_embedding(const Params& p, const Part& part, uint2 (&to)[kQuads]) {
  const std::int64_t id = *p.id;
  const bool known = id >= 0 && id < p.vocabulary;
  const T* const from = static_cast<const T*>(p.embedding) + (known ? id : 0) * p.d_model;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    to[i] = uint2{0, 0};
    if (i * 32 < part.quads && known && part.has(i))
      to[i] = __ldg(reinterpret_cast<const uint2*>(from + part.column(i)));
  }
}

}  // namespace krait::decode_detail

#endif

namespace krait::decode_detail {

template <typename T, int kSteps>
class Layer {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
 public:
  __device__ Layer(Computer<T, kSteps>& computer, int block, int blocks)
      : c_(computer),
        p_(computer.p),
        in_(share_of(p_.in_rows, block, blocks)),
        channels_(share_of(p_.d_inner, block, blocks)),
        out_(share_of(p_.d_model, block, blocks)),
        row_(state_row(p_)),
        in_projection_(p_, in_, row_),
        own_row_(in_projection_.row(static_cast<int>(threadIdx.x))) {}

 protected:
  static constexpr bool kKnown = Computer<T, kSteps>::kKnown;
  static constexpr int kQuads = Computer<T, kSteps>::kQuads;
  static constexpr int kInnerQuads = Computer<T, kSteps>::kInnerQuads;

  // From the words of the layer in front (`epoch` - 1), or the embedding, to those of in_proj.
  __device__ __forceinline__ void project_in(const LayerPointers& layer, bool first, unsigned epoch,
                                             const Part& part, float (&residual)[kQuads][4]) {
    const int thread = static_cast<int>(threadIdx.x);
    float4 weight[kQuads];
    c_.load_weight(layer.norm_weight, part, weight);
    ConvRow row = own_row_;
    in_projection_.load(layer, thread, row);
    uint2 came[kQuads];
    if (first)
      read_embedding<T>(p_, part, came);
    else
      read_pairs(p_.words.hidden + part.first / 2, part.quads, epoch - 1, came);
    c_.stage_norm(part, layer.norm_bias, weight, came, residual);
    c_.template multiply_model<kKnown>(in_.count, [&](int i, bool there, float sum) {
      if (!kKnown && i != thread) {
        row = in_projection_.row(i);
        in_projection_.load(layer, i, row);
      }
      in_projection_.finish(layer, row, i, there, sum, epoch);
    });
  }

  // Of the thread's first row of out_proj.
  [[nodiscard]] __device__ __forceinline__ float out_bias(const LayerPointers& layer) const {
    const int thread = static_cast<int>(threadIdx.x);
    return c_.has_extra(layer.out_bias) && thread < out_.count ? __ldg(layer.out_bias + out_.first + thread)
                                                               : 0.0F;
  }
  // out_proj of the staged vector.
  __device__ __forceinline__ void project_out(const LayerPointers& layer, float bias, unsigned epoch) {
    const int thread = static_cast<int>(threadIdx.x);
    c_.template multiply_inner<kKnown>(out_.count, [&](int i, bool there, float sum) {
      float own = bias;
      if (!kKnown && i != thread && there && c_.has_extra(layer.out_bias))
        own = __ldg(layer.out_bias + out_.first + i);
      publish<T>(p_.words.hidden, out_.first + i, there, sum + own, epoch);
    });
  }

  Computer<T, kSteps>& c_;
  const Params& p_;
  const Share in_;
  const Share channels_;
  const Share out_;
  const std::int64_t row_;
  const InProjection<T, kKnown> in_projection_;
  const ConvRow own_row_;  // of a layer nothing yet
#endif
};

}  // namespace krait::decode_detail
