// A layer of Mamba-2 in three stages: norm, in_proj and convolution; the recurrence; gated norm and out_proj.
#include "ops/decode_step/cuda/kernel.cuh"

namespace krait::decode_detail {
namespace {

template <typename T, int kQuads, bool kPlain>
class Mamba2Mixer : Layer<T, kQuads, kPlain> {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Base = Layer<T, kQuads, kPlain>;
  using Base::c_;
  using Base::channels_;
  using Base::out_;
  using Base::p_;
  using Base::row_;

 public:
  __device__ Mamba2Mixer(Computer<T, kQuads, kPlain>& computer, int block, int blocks)
      : Base(computer, block, blocks) {}

  static __device__ void bring(const Params& p, const LayerPointers& layer, Producer& producer, int block,
                               int blocks) {
    const Share in = share_of(p.in_rows, block, blocks);
    Producer::announce_share(layer.norm_weight, p.d_model, block);
    Producer::announce_share(layer.gated_norm_weight, p.d_inner, block);
    InProjection<T, kPlain>::announce(p, layer, in, state_row(p));
    producer.bring_rows<T>(layer.in_weight, p.d_model, in.first, in.count, p.model_tile);
    const Share channels = share_of(p.d_inner, block, blocks);
    const int first_head = channels.first / p.headdim;
    const int heads = (channels.first + channels.count - 1) / p.headdim + 1 - first_head;
    Producer::announce(layer.A, first_head, heads);
    Producer::announce(layer.dt_bias, first_head, heads);
    if (p.D_by_channel)
      Producer::announce(layer.D, channels.first, channels.count);
    else
      Producer::announce(layer.D, first_head, heads);
    const std::int64_t at = first_state(p, state_row(p), channels.first);
    if (p.state_dtype == DType::f32)
      producer.bring_rows<float>(static_cast<const float*>(layer.ssm_state) + at, p.d_state, 0,
                                 channels.count, p.state_tile, /*once=*/false);
    else
      producer.bring_rows<std::uint16_t>(static_cast<const std::uint16_t*>(layer.ssm_state) + at, p.d_state,
                                         0, channels.count, p.state_tile, /*once=*/false);
    const Share out = share_of(p.d_model, block, blocks);
    producer.bring_rows<T>(layer.out_weight, p.d_inner, out.first, out.count, p.inner_tile);
  }

  __device__ __forceinline__ void step(int l, unsigned before, const Part& part,
                                       float (&residual)[kQuads][4]) {
    const LayerPointers& layer = p_.layer[l];
    const unsigned epoch = before + 1;
    Base::project_in(layer, l == 0, epoch, part, residual);
    recur(layer, epoch);
    finish(layer, epoch);
  }

 private:
  static constexpr int kVectors = (kPlain ? kPlainStates : kMostStates) / 128;  // of four states, of a lane
  // Each warp has some of the block's channels, one behind the other: what a channel has but its states is
  // computed by a lane each, and the states by all lanes, four of a channel each.
  __device__ __forceinline__ void recur(const LayerPointers& layer, unsigned epoch) {
    const int bytes_of_state = c_.state_dtype() == DType::f32 ? 4 : 2;
    for (int begin = 0; begin < channels_.count; begin += p_.state_tile) {
      const int count = min(p_.state_tile, channels_.count - begin);
      const int pairs = count / 2;
      const int mine = pairs * c_.warp / kWarps * 2;
      const int end = pairs * (c_.warp + 1) / kWarps * 2;
      const int first = channels_.first + begin + mine;
      const int own = end - mine;
      const bool has = c_.lane < own;
      const int channel = first + (has ? c_.lane : 0);
      const int head = channel / p_.headdim;
      float A = 0.0F;
      float skip = 0.0F;
      float bias = 0.0F;
      if (has) {
        A = __ldg(layer.A + head);
        if (c_.has(layer.D)) skip = __ldg(layer.D + ((!kPlain && p_.D_by_channel) ? channel : head));
        if (c_.has(layer.dt_bias)) bias = __ldg(layer.dt_bias + head);
      }
      float decay = 0.0F;
      float input = 0.0F;
      float x = 0.0F;
      float gate = 1.0F;
      uint2 B_bits[kVectors];
      uint2 C_bits[kVectors];
      int group = c_.groups() > 1 && own > 0 ? first / p_.headdim / p_.heads_per_group : 0;
      if (own > 0) {
        const std::uint64_t* const words = p_.words.projected;
        const int x_row = p_.d_inner + channel;
        const int dt_row = p_.conv_first + p_.conv_channels + head;
        uint2 z_word{0, epoch};
        uint2 x_word;
        uint2 dt_word;
        Factors B(factors(group), p_.d_state / 4);
        Factors C(factors(group) + p_.groups * p_.d_state / 2, p_.d_state / 4);
        wait_for(
            [&] {
              x_word = load_word(words + x_row / 2);
              dt_word = load_word(words + dt_row / 2);
              if (!c_.gated_norm()) z_word = load_word(words + channel / 2);
              B.load();
              C.load();
            },
            [&] {
              return x_word.y != epoch || dt_word.y != epoch || z_word.y != epoch || B.missing(epoch) ||
                     C.missing(epoch);
            });
        B.take(B_bits);
        C.take(C_bits);
        const auto half_of = [](uint2 word, int row) {
          return row % 2 == 0 ? low_half<T>(word.x) : high_half<T>(word.x);
        };
        x = half_of(x_word, x_row);
        float dt = cuda::softplus(half_of(dt_word, dt_row) + bias);
        // Not fminf and fmaxf, which lose a NaN.
        dt = dt < p_.dt_low ? p_.dt_low : dt > p_.dt_high ? p_.dt_high : dt;
        decay = expf(dt * A);
        input = dt * x;
        if (!c_.gated_norm()) gate = cuda::silu(half_of(z_word, channel));
      }
      unsigned slot;
      const unsigned char* const states = c_.wait_for_tile(count * p_.d_state * bytes_of_state, slot);
      float y = 0.0F;
      for (int r = 0; r < own; r += 2) {
        // Two channels of one head.
        const int group_here = c_.groups() == 1 ? 0 : (first + r) / p_.headdim / p_.heads_per_group;
        if (group_here != group) {
          group = group_here;
          read_pairs(factors(group), p_.d_state / 4, epoch, B_bits);
          read_pairs(factors(group) + p_.groups * p_.d_state / 2, p_.d_state / 4, epoch, C_bits);
        }
        float sum[2] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float decay_here = __shfl_sync(0xffffffffU, decay, r + k);
          const float input_here = __shfl_sync(0xffffffffU, input, r + k);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int n = v * 128 + c_.lane * 4;
            if (n >= p_.d_state) continue;
            float B[4];
            float C[4];
            widen<T>(B_bits[v], B);
            widen<T>(C_bits[v], C);
            float4 s = load_states(states, std::int64_t{mine + r + k} * p_.d_state + n, c_.state_dtype());
            s.x = fmaf(decay_here, s.x, input_here * B[0]);
            s.y = fmaf(decay_here, s.y, input_here * B[1]);
            s.z = fmaf(decay_here, s.z, input_here * B[2]);
            s.w = fmaf(decay_here, s.w, input_here * B[3]);
            sum[k] = fmaf(s.x, C[0], sum[k]);
            sum[k] = fmaf(s.y, C[1], sum[k]);
            sum[k] = fmaf(s.z, C[2], sum[k]);
            sum[k] = fmaf(s.w, C[3], sum[k]);
            if (row_ >= 0)
              store_states(layer.ssm_state,
                           row_ * p_.ssm_stride + std::int64_t{first + r + k} * p_.d_state + n,
                           c_.state_dtype(), s);
          }
        }
        sum[0] = cuda::warp_sum(sum[0]);
        sum[1] = cuda::warp_sum(sum[1]);
        if (c_.lane == r) y = sum[0];
        if (c_.lane == r + 1) y = sum[1];
      }
      c_.release_tile(slot);
      if (c_.has(layer.D)) y = fmaf(skip, x, y);
      y *= gate;
      publish<T>(p_.words.y, first + c_.lane, has, row_ >= 0 ? y : 0.0F, epoch);
    }
  }

  // B of a group of channels, four states a lane; C lies behind those of all groups.
  using Factors = PairReader<kVectors>;
  [[nodiscard]] __device__ const std::uint64_t* factors(int group) const {
    return p_.words.projected + (2 * p_.d_inner + group * p_.d_state) / 2;
  }

  __device__ __forceinline__ void finish(const LayerPointers& layer, unsigned epoch) {
    const Part part(p_.d_inner, p_.inner_steps);
    float4 weight[2 * kQuads];
    if (c_.gated_norm()) c_.load_weight(layer.gated_norm_weight, part, weight);
    const float bias = Base::out_bias(layer);
    uint2 y[2 * kQuads];
    if (c_.gated_norm()) {
      uint2 z[2 * kQuads];
      if constexpr (kQuads == 1) {
        // One trip for both where the whole time is made of trips.
        PairReader<2> z_reader(p_.words.projected + part.first / 2, part.quads);
        PairReader<2> y_reader(p_.words.y + part.first / 2, part.quads);
        wait_for(
            [&] {
              z_reader.load();
              y_reader.load();
            },
            [&] { return z_reader.missing(epoch) || y_reader.missing(epoch); });
        z_reader.take(z);
        y_reader.take(y);
      } else {
        read_pairs(p_.words.projected + part.first / 2, part.quads, epoch, z);
        read_pairs(p_.words.y + part.first / 2, part.quads, epoch, y);
      }
      c_.stage_gated_norm(part, weight, z, y);
    } else {
      read_pairs(p_.words.y + part.first / 2, part.quads, epoch, y);
      c_.stage_plain(part, y);
    }
    Base::project_out(layer, bias, epoch);
  }
#endif
};

}  // namespace

void launch_mamba2(Context& ctx, DType dtype, const DecodePlan& plan, const Params& params) {
  launch_decode<Mamba2Mixer>(ctx, dtype, plan, params);
}

}  // namespace krait::decode_detail
