// A layer of Mamba-2 in three stages: norm, in_proj and convolution; the recurrence; gated norm and out_proj.
#include "ops/decode_step/cuda/kernel.cuh"

namespace krait::decode_detail {
namespace {

template <typename T, int kSteps>
class Mamba2Mixer : Layer<T, kSteps> {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using Base = Layer<T, kSteps>;
  using Base::c_;
  using Base::channels_;
  using Base::kInnerQuads;
  using Base::kKnown;
  using Base::kQuads;
  using Base::out_;
  using Base::p_;
  using Base::row_;

 public:
  __device__ Mamba2Mixer(Computer<T, kSteps>& computer, int block, int blocks)
      : Base(computer, block, blocks),
        states_(held(
            first_state(p_, row_, channels_.first + first_pair(channels_.count, c_.warp) * 2) + c_.lane * 4,
            computer.own)) {}

  static __device__ void bring(const Params& p, const LayerPointers& layer, Producer& producer, int block,
                               int blocks) {
    const Share in = share_of(p.in_rows, block, blocks);
    Producer::announce_share(layer.norm_weight, p.d_model, block);
    Producer::announce_share(layer.gated_norm_weight, p.d_inner, block);
    InProjection<T, kKnown>::announce(p, layer, in, state_row(p));
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
  // Of `count` channels, those from this pair on are of warp `warp` and the ones behind it.
  [[nodiscard]] static __device__ int first_pair(int count, int warp) { return count / 2 * warp / kWarps; }

  static constexpr int kVectors = (kKnown ? kKnownStates : kMostStates) / 128;  // of four states, of a lane
  // Pairs of words with B and C of all groups, of a lane.
  static constexpr int kFactors = kKnown ? 1 : kMostGroups * kMostStates / 2 / kWarps / 32;
  static constexpr int kKnownLane = 8;  // one that reads no B or C
  [[nodiscard]] __device__ int headdim() const { return kKnown ? kKnownHeaddim : p_.headdim; }
  [[nodiscard]] __device__ int d_state() const { return kKnown ? kKnownStates : p_.d_state; }
  // Whether the recurrence multiplies y with silu(z), of its own channels, before anyone reads it.
  [[nodiscard]] __device__ bool gates_early() const { return !c_.norm_before_gate(); }

  // B and C of all groups, which every channel of a group needs, are read by the block once, an eighth by
  // each warp: what all warps of all blocks ask for at once, the L2 cache serves slowly. Then each warp has
  // some of the block's channels, one behind the other: what a channel has but its states is computed by a
  // lane each, and the states by all lanes, four of a channel each.
  __device__ __forceinline__ void recur(const LayerPointers& layer, unsigned epoch) {
    const int bytes_of_state = c_.state_dtype() == DType::f32 ? 4 : 2;
    for (int begin = 0; kKnown ? begin == 0 : begin < channels_.count; begin += p_.state_tile) {
      const int count = kKnown ? channels_.count : min(p_.state_tile, channels_.count - begin);
      const int mine = first_pair(count, c_.warp) * 2;
      const int end = first_pair(count, c_.warp + 1) * 2;
      const int first = channels_.first + begin + mine;
      const int own = end - mine;
      const bool has = c_.lane < own;
      const int channel = has ? first + c_.lane : channels_.first;
      const int head = channel / headdim();
      // Known models have few heads in a block: the step of each is computed by a thread, of a warp each.
      const int first_head = channels_.first / headdim();
      const bool steps_head = !kKnown || (c_.lane == kKnownLane && (first_head + c_.warp) * headdim() <
                                                                       channels_.first + channels_.count);
      const int stepped = kKnown ? first_head + c_.warp : head;
      const float skip =
          has && c_.has(layer.D) ? __ldg(layer.D + ((!kKnown && p_.D_by_channel) ? channel : head)) : 0.0F;
      const float A = steps_head ? __ldg(layer.A + stepped) : 0.0F;
      const float bias = steps_head && c_.has(layer.dt_bias) ? __ldg(layer.dt_bias + stepped) : 0.0F;

      const std::uint64_t* const words = p_.words.projected;
      const int x_row = c_.d_inner() + channel;
      const int dt_row = p_.conv_first + p_.conv_channels + stepped;
      const int quads = c_.groups() * d_state() / 2;  // of B and C
      const int of_warp = (quads + kWarps - 1) / kWarps;
      const int first_quad = min(c_.warp * of_warp, quads);
      PairReader<kFactors> factors(words + c_.d_inner() + 2 * first_quad,
                                   kKnown ? of_warp : min(of_warp, quads - first_quad));
      uint2 x_word;
      uint2 dt_word{0, epoch};
      uint2 z_word{0, epoch};
      wait_for(
          [&] {
            x_word = load_word(words + x_row / 2);
            if (steps_head) dt_word = load_word(words + dt_row / 2);
            if (gates_early()) z_word = load_word(words + channel / 2);
            factors.load();
          },
          [&] {
            return x_word.y != epoch || dt_word.y != epoch || z_word.y != epoch || factors.missing(epoch);
          });
      uint2 bits[kFactors];
      factors.take(bits);
#pragma unroll
      for (int i = 0; i < kFactors; ++i) {
        const int quad = i * 32 + c_.lane;
        if (quad < of_warp && first_quad + quad < quads)
          write(c_.shared_.low + 8U * static_cast<unsigned>(first_quad + quad), bits[i]);
      }
      const auto half_of = [](uint2 word, int row) {
        return row % 2 == 0 ? low_half<T>(word.x) : high_half<T>(word.x);
      };
      float dt = 0.0F;
      float decay = 0.0F;
      const unsigned heads =
          c_.shared_.low + (4U * static_cast<unsigned>(c_.groups() * d_state()) + 127U) / 128U * 128U;
      if (steps_head) {
        dt = cuda::softplus(half_of(dt_word, dt_row) + bias);
        // Not fminf and fmaxf, which lose a NaN.
        dt = dt < p_.dt_low ? p_.dt_low : dt > p_.dt_high ? p_.dt_high : dt;
        decay = expf(dt * A);
        if (kKnown)
          write(heads + 8U * static_cast<unsigned>(c_.warp),
                uint2{__float_as_uint(dt), __float_as_uint(decay)});
      }
      cuda::meet<kThreads>();
      if (kKnown) {
        const uint2 step = read_8(heads + 8U * static_cast<unsigned>(head - first_head));
        dt = __uint_as_float(step.x);
        decay = __uint_as_float(step.y);
      }
      const float x = half_of(x_word, x_row);
      const float input = dt * x;
      const float gate = gates_early() ? cuda::quick_silu(half_of(z_word, channel)) : 1.0F;
      const std::int64_t to = kKnown ? states_ : first_state(p_, row_, first) + c_.lane * 4;
      int group = c_.groups() > 1 && own > 0 ? first / headdim() / p_.heads_per_group : 0;
      uint2 B_bits[kVectors];
      uint2 C_bits[kVectors];
      read_factors(group, B_bits, C_bits);
      const Ring::Place place = c_.wait_for_tile(count * d_state() * bytes_of_state);
      const unsigned char* const states = c_.shared_.ring + place.offset;
      float y = 0.0F;
      for (int r = 0; r < own; r += 2) {
        // Two channels of one head.
        const int group_here = c_.groups() == 1 ? 0 : (first + r) / headdim() / p_.heads_per_group;
        if (group_here != group) {
          group = group_here;
          read_factors(group, B_bits, C_bits);
        }
        float sum[2] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float decay_here = __shfl_sync(0xffffffffU, decay, r + k);
          const float input_here = __shfl_sync(0xffffffffU, input, r + k);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int n = v * 128 + c_.lane * 4;
            if (n >= d_state()) continue;
            float B[4];
            float C[4];
            widen<T>(B_bits[v], B);
            widen<T>(C_bits[v], C);
            float4 s = load_states(states, std::int64_t{mine + r + k} * d_state() + n, c_.state_dtype());
            s.x = fmaf(decay_here, s.x, input_here * B[0]);
            s.y = fmaf(decay_here, s.y, input_here * B[1]);
            s.z = fmaf(decay_here, s.z, input_here * B[2]);
            s.w = fmaf(decay_here, s.w, input_here * B[3]);
            sum[k] = fmaf(s.x, C[0], sum[k]);
            sum[k] = fmaf(s.y, C[1], sum[k]);
            sum[k] = fmaf(s.z, C[2], sum[k]);
            sum[k] = fmaf(s.w, C[3], sum[k]);
            if (row_ >= 0)
              store_states(layer.ssm_state, to + std::int64_t{r + k} * d_state() + v * 128, c_.state_dtype(),
                           s);
          }
        }
        sum[0] = cuda::warp_sum(sum[0]);
        sum[1] = cuda::warp_sum(sum[1]);
        if (c_.lane == r) y = sum[0];
        if (c_.lane == r + 1) y = sum[1];
      }
      c_.release_tile(place);
      if (c_.has(layer.D)) y = fmaf(skip, x, y);
      y *= gate;
      if (c_.gated_norm()) y = saturated<T>(y);
      publish<T>(p_.words.y, first + c_.lane, has, row_ >= 0 ? y : 0.0F, epoch);
    }
  }

  // Of a group of channels, four states a lane; C lies behind B of all groups.
  __device__ __forceinline__ void read_factors(int group, uint2 (&B)[kVectors], uint2 (&C)[kVectors]) const {
    const unsigned from = c_.shared_.low + 2U * static_cast<unsigned>(group * d_state() + c_.lane * 4);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v * 128 + c_.lane * 4 >= d_state()) continue;
      B[v] = read_8(from + 256U * static_cast<unsigned>(v));
      C[v] = read_8(from + 256U * static_cast<unsigned>(v) +
                    2U * static_cast<unsigned>(c_.groups() * d_state()));
    }
  }

  __device__ __forceinline__ void finish(const LayerPointers& layer, unsigned epoch) {
    const Part part = c_.inner_part();
    float4 weight[kInnerQuads];
    if (c_.gated_norm()) c_.load_weight(layer.gated_norm_weight, part, weight);
    const float bias = Base::out_bias(layer);
    uint2 z[kInnerQuads];
    if (!gates_early()) read_pairs(p_.words.projected + part.first / 2, part.quads, epoch, z);
    uint2 y[kInnerQuads];
    read_pairs(p_.words.y + part.first / 2, part.quads, epoch, y);
    if (c_.gated_norm())
      c_.stage_gated_norm(part, weight, z, y);
    else
      c_.stage_plain(part, y);
    Base::project_out(layer, bias, epoch);
  }

  const std::int64_t states_;  // the thread's first ones
#endif
};

}  // namespace

void launch_mamba2(Context& ctx, DType dtype, const DecodePlan& plan, const Params& params) {
  launch_decode<Mamba2Mixer>(ctx, dtype, plan, params);
}

}  // namespace krait::decode_detail
