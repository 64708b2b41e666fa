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

// in_proj's rows: a convolution of 4 taps over some of them, one row a thread.
struct ConvRow {
  float4 taps;
  float bias;
  float before[3];
  float product_bias;
};

template <typename T, bool kPlain>
class InProjection {
 public:
  __device__ InProjection(const Params& p, Share rows, std::int64_t state_row)
      : p_(p), rows_(rows), state_row_(state_row) {}

  __device__ __forceinline__ bool convolves(int row) const {
    return row >= p_.conv_first && row < p_.conv_first + p_.conv_channels;
  }
  // What `early` will read, for all rows of a block.
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
  // What row `i` of the block's needs beside its sum.
  __device__ __forceinline__ ConvRow early(const LayerPointers& layer, int i) const {
    ConvRow e{};
    if (i >= rows_.count) return e;
    const int row = rows_.first + i;
    if (!kPlain && layer.in_bias != nullptr) e.product_bias = __ldg(layer.in_bias + row);
    if (!convolves(row)) return e;
    const int channel = row - p_.conv_first;
    e.taps = __ldg(reinterpret_cast<const float4*>(layer.conv_weight) + channel);
    if (kPlain || layer.conv_bias != nullptr) e.bias = __ldg(layer.conv_bias + channel);
    if (state_row_ >= 0) {
      const float* from = window(layer, channel);
#pragma unroll
      for (int k = 0; k < 3; ++k) e.before[k] = from[k * p_.conv_stride[2]];
    }
    return e;
  }
  __device__ __forceinline__ void finish(const LayerPointers& layer, const ConvRow& e, int i, bool there,
                                         float sum, unsigned epoch) const {
    const int row = rows_.first + i;
    const float now = rounded<T>(sum + e.product_bias);
    float value = now;
    if (there && convolves(row)) {
      float y = fmaf(e.taps.x, e.before[0], e.bias);
      y = fmaf(e.taps.y, e.before[1], y);
      y = fmaf(e.taps.z, e.before[2], y);
      y = fmaf(e.taps.w, now, y);
      value = state_row_ >= 0 ? y * (1.0F / (1.0F + expf(-y))) : 0.0F;
    }
    publish<T>(p_.words.projected, row, there, value, epoch);
    if (there && convolves(row) && state_row_ >= 0) {
      float* const to = window(layer, row - p_.conv_first);
      to[0] = e.before[1];
      to[p_.conv_stride[2]] = e.before[2];
      to[2 * p_.conv_stride[2]] = now;
    }
  }

 private:
  __device__ float* window(const LayerPointers& layer, int channel) const {
    return layer.conv_state + state_row_ * p_.conv_stride[0] + channel * p_.conv_stride[1];
  }
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
    *reinterpret_cast<float4*>(static_cast<float*>(to) + at) = v;
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

template <typename T, int kQuads, bool kPlain>
class Layer {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
 public:
  __device__ Layer(Computer<T, kQuads, kPlain>& computer, int block, int blocks)
      : c_(computer),
        p_(computer.p),
        in_(share_of(p_.in_rows, block, blocks)),
        channels_(share_of(p_.d_inner, block, blocks)),
        out_(share_of(p_.d_model, block, blocks)),
        row_(state_row(p_)),
        in_projection_(p_, in_, row_) {}

 protected:
  // From the words of the layer in front (`epoch` - 1), or the embedding, to those of in_proj.
  __device__ __forceinline__ void project_in(const LayerPointers& layer, bool first, unsigned epoch,
                                             const Part& part, float (&residual)[kQuads][4]) {
    const int thread = static_cast<int>(threadIdx.x);
    float4 weight[kQuads];
    c_.load_weight(layer.norm_weight, part, weight);
    const ConvRow row = in_projection_.early(layer, thread);
    uint2 came[kQuads];
    if (first)
      read_embedding<T>(p_, part, came);
    else
      read_pairs(p_.words.hidden + part.first / 2, part.quads, epoch - 1, came);
    c_.stage_norm(part, layer.norm_bias, weight, came, residual);
    c_.template multiply<kPlain>(p_.d_model, p_.model_steps, in_.count, p_.model_tile,
                                 [&](int i, bool there, float sum) {
                                   ConvRow own = row;
                                   if (!kPlain && i != thread) own = in_projection_.early(layer, i);
                                   in_projection_.finish(layer, own, i, there, sum, epoch);
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
    c_.template multiply<kPlain>(p_.d_inner, p_.inner_steps, out_.count, p_.inner_tile,
                                 [&](int i, bool there, float sum) {
                                   float own = bias;
                                   if (!kPlain && i != thread && there && c_.has_extra(layer.out_bias))
                                     own = __ldg(layer.out_bias + out_.first + i);
                                   publish<T>(p_.words.hidden, out_.first + i, there, sum + own, epoch);
                                 });
  }

  Computer<T, kQuads, kPlain>& c_;
  const Params& p_;
  const Share in_;
  const Share channels_;
  const Share out_;
  const std::int64_t row_;
  const InProjection<T, kPlain> in_projection_;
#endif
};

}  // namespace krait::decode_detail
