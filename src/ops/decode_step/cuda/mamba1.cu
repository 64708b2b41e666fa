// A layer of Mamba-1 in four stages: norm, in_proj and convolution; x_proj; dt_proj, scan step and gate;
// out_proj.
#include "ops/decode_step/cuda/kernel.cuh"

namespace krait::decode_detail {
namespace {

template <typename T, int kSteps>
class Mamba1Mixer : Layer<T, kSteps> {
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
  __device__ Mamba1Mixer(Computer<T, kSteps>& computer, int block, int blocks)
      : Base(computer, block, blocks),
        low_(share_of(p_.dt_rank + 2 * p_.d_state, block, blocks)),
        part_(computer.inner_part()),
        lanes_(kKnown ? kKnownLowStates / 4 : p_.d_state / 4) {}

  static __device__ void bring(const Params& p, const LayerPointers& layer, Producer& producer, int block,
                               int blocks) {
    const Share in = share_of(p.in_rows, block, blocks);
    Producer::announce_share(layer.norm_weight, p.d_model, block);
    InProjection<T, kKnown>::announce(p, layer, in, state_row(p));
    const Share channels = share_of(p.d_inner, block, blocks);
    Producer::announce(static_cast<const T*>(layer.dt_weight), std::int64_t{channels.first} * p.dt_rank,
                       channels.count * p.dt_rank);
    Producer::announce(layer.A, std::int64_t{channels.first} * p.d_state, channels.count * p.d_state);
    Producer::announce(layer.dt_bias, channels.first, channels.count);
    Producer::announce(layer.D, channels.first, channels.count);
    const int states = channels.count * p.d_state;
    const std::int64_t at = first_state(p, state_row(p), channels.first);
    if (p.state_dtype == DType::f32)
      Producer::announce(static_cast<const float*>(layer.ssm_state), at, states);
    else
      Producer::announce(static_cast<const std::uint16_t*>(layer.ssm_state), at, states);
    producer.bring_rows<T>(layer.in_weight, p.d_model, in.first, in.count, p.model_tile);
    const Share low = share_of(p.dt_rank + 2 * p.d_state, block, blocks);
    producer.bring_rows<T>(layer.x_weight, p.d_inner, low.first, low.count, p.inner_tile);
    const Share out = share_of(p.d_model, block, blocks);
    producer.bring_rows<T>(layer.out_weight, p.d_inner, out.first, out.count, p.inner_tile);
  }

  __device__ __forceinline__ void step(int l, unsigned before, const Part& part,
                                       float (&residual)[kQuads][4]) {
    const LayerPointers& layer = p_.layer[l];
    const unsigned epoch = before + 1;
    Base::project_in(layer, l == 0, epoch, part, residual);
    // What the scan needs beside the stages' results is on its way while they pass.
    const Channel early = load_channel(layer, static_cast<int>(threadIdx.x) / lanes_);
    project_low(epoch);
    scan(layer, epoch, early);
    finish(layer, epoch);
  }

 private:
  // Of 16 bytes of a row of dt_proj that a lane has.
  static constexpr int kDtPieces =
      kKnown ? (kSteps * kKnownRankOfStep / 8 + kKnownLowStates / 4 - 1) / (kKnownLowStates / 4)
             : kMostDtPieces;
  // Pairs of words that x_proj gives, of a lane.
  static constexpr int kLowPairs = kKnown ? 1 : kMostLow / 4 / kWarps / 32;
  [[nodiscard]] __device__ int d_state() const { return kKnown ? kKnownLowStates : p_.d_state; }
  [[nodiscard]] __device__ int dt_rank() const { return kKnown ? kSteps * kKnownRankOfStep : p_.dt_rank; }

  // A lane's share of a channel: 4 states, and every lanes_-th piece of its row of dt_proj.
  struct Channel {
    uint4 dt_weight[kDtPieces];
    float4 state;
    float4 A;
    float bias;
    float skip;
  };

  __device__ __forceinline__ Channel load_channel(const LayerPointers& layer, int i) const {
    Channel e{};
    if (i >= channels_.count) return e;
    const int channel = channels_.first + i;
    const int lane = c_.lane % lanes_;
    const auto* const weight = reinterpret_cast<const uint4*>(static_cast<const T*>(layer.dt_weight) +
                                                              std::int64_t{channel} * dt_rank());
#pragma unroll
    for (int k = 0; k < kDtPieces; ++k) {
      const int piece = k * lanes_ + lane;
      if (k * lanes_ * 8 >= dt_rank()) break;
      if (piece * 8 < dt_rank()) e.dt_weight[k] = __ldg(weight + piece);
    }
    e.state = load_states(layer.ssm_state, state_at(channel), c_.state_dtype());
    e.A = __ldg(reinterpret_cast<const float4*>(layer.A + std::int64_t{channel} * d_state()) + lane);
    e.bias = c_.has(layer.dt_bias) ? __ldg(layer.dt_bias + channel) : 0.0F;
    e.skip = c_.has(layer.D) ? __ldg(layer.D + channel) : 0.0F;
    return e;
  }
  [[nodiscard]] __device__ std::int64_t state_at(int channel) const {
    return first_state(p_, row_, channel) + c_.lane % lanes_ * 4;
  }

  __device__ __forceinline__ void project_low(unsigned epoch) {
    if (low_.count == 0) return;
    uint2 x[kInnerQuads];
    read_pairs(p_.words.projected + part_.first / 2, part_.quads, epoch, x);
    c_.stage_plain(part_, x);
    c_.template multiply_inner<kKnown>(low_.count, [&](int i, bool there, float sum) {
      publish<T>(p_.words.low, low_.first + i, there, sum, epoch);
    });
  }

  // What x_proj gave, dt before its projection, B and C, is read by the block once, an eighth by each warp.
  __device__ __forceinline__ void scan(const LayerPointers& layer, unsigned epoch, const Channel& early) {
    const int quads = (dt_rank() + 2 * d_state()) / 4;
    const int of_warp = (quads + kWarps - 1) / kWarps;
    const int first_quad = min(c_.warp * of_warp, quads);
    const int first_of_warp = c_.warp * 32 / lanes_;
    const int own = static_cast<int>(threadIdx.x) / lanes_;
    Inputs inputs = inputs_of(own);
    PairReader<kLowPairs> reader(p_.words.low + 2 * first_quad, min(of_warp, quads - first_quad));
    wait_for(
        [&] {
          inputs.load();
          reader.load();
        },
        [&] { return inputs.missing(epoch) || reader.missing(epoch); });
    uint2 came[kLowPairs];
    reader.take(came);
#pragma unroll
    for (int i = 0; i < kLowPairs; ++i) {
      const int quad = i * 32 + c_.lane;
      if (quad < of_warp && first_quad + quad < quads)
        write(c_.shared_.low + 8U * static_cast<unsigned>(first_quad + quad), came[i]);
    }
    cuda::meet<kThreads>();
    if (!kKnown && p_.mixer_norm) {
      auto* const low = reinterpret_cast<T*>(c_.shared_.ring + (c_.shared_.low - c_.ring_.memory()));
      if (c_.warp == 0) normalize(low, dt_rank());
      if (c_.warp == 1) normalize(low + dt_rank(), d_state());
      if (c_.warp == 2) normalize(low + dt_rank() + d_state(), d_state());
      cuda::meet<kThreads>();
    }
    if (first_of_warp >= channels_.count) return;
    const unsigned at = c_.shared_.low + 2U * static_cast<unsigned>(dt_rank() + c_.lane % lanes_ * 4);
    float B[4];
    float C[4];
    widen<T>(read_8(at), B);
    widen<T>(read_8(at + 2U * static_cast<unsigned>(d_state())), C);
    scan_channel(layer, epoch, own, inputs, early, B, C);
    for (int i = own + kThreads / lanes_; first_of_warp + i - own < channels_.count; i += kThreads / lanes_) {
      inputs = inputs_of(i);
      wait_for([&] { inputs.load(); }, [&] { return inputs.missing(epoch); });
      scan_channel(layer, epoch, i, inputs, load_channel(layer, i), B, C);
    }
  }

  // x and z of a channel; of the first where the block has no channel i.
  struct Inputs {
    const std::uint64_t* x_from;
    const std::uint64_t* z_from;
    uint2 x;
    uint2 z;

    __device__ __forceinline__ void load() {
      x = load_word(x_from);
      z = load_word(z_from);
    }
    [[nodiscard]] __device__ bool missing(unsigned epoch) const { return x.y != epoch || z.y != epoch; }
  };
  [[nodiscard]] __device__ Inputs inputs_of(int i) const {
    const int channel = channels_.first + (i < channels_.count ? i : 0);
    return {.x_from = p_.words.projected + channel / 2,
            .z_from = p_.words.projected + (c_.d_inner() + channel) / 2,
            .x = {},
            .z = {}};
  }

  // By all lanes of a warp; channels beyond the block's are computed and dropped.
  __device__ __forceinline__ void scan_channel(const LayerPointers& layer, unsigned epoch, int i,
                                               const Inputs& inputs, const Channel& e, const float (&B)[4],
                                               const float (&C)[4]) const {
    const bool there = i < channels_.count;
    const int channel = channels_.first + (there ? i : 0);
    const int lane = c_.lane % lanes_;
    const float x = channel % 2 == 0 ? low_half<T>(inputs.x.x) : high_half<T>(inputs.x.x);
    const float z = channel % 2 == 0 ? low_half<T>(inputs.z.x) : high_half<T>(inputs.z.x);
    float dt = 0.0F;
#pragma unroll
    for (int k = 0; k < kDtPieces; ++k) {
      if (k * lanes_ * 8 >= dt_rank()) break;
      const int piece = k * lanes_ + lane;
      if (piece * 8 >= dt_rank()) continue;
      const uint4 v = read_16(c_.shared_.low + 16U * static_cast<unsigned>(piece));
      dot(uint2{e.dt_weight[k].x, e.dt_weight[k].y}, uint2{v.x, v.y}, dt);
      dot(uint2{e.dt_weight[k].z, e.dt_weight[k].w}, uint2{v.z, v.w}, dt);
    }
    for (int apart = lanes_ / 2; apart > 0; apart /= 2) dt += __shfl_xor_sync(0xffffffffU, dt, apart);
    dt = cuda::softplus(dt + e.bias);

    constexpr float kLog2E = 1.4426950408889634F;
    const float rate = dt * kLog2E;
    float4 s = e.state;
    s.x = exp2f(rate * e.A.x) * s.x + dt * x * B[0];
    s.y = exp2f(rate * e.A.y) * s.y + dt * x * B[1];
    s.z = exp2f(rate * e.A.z) * s.z + dt * x * B[2];
    s.w = exp2f(rate * e.A.w) * s.w + dt * x * B[3];
    float y = (s.x * C[0] + s.y * C[1]) + (s.z * C[2] + s.w * C[3]);
    for (int apart = lanes_ / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(0xffffffffU, y, apart);
    if (c_.has(layer.D)) y += e.skip * x;
    y *= cuda::quick_silu(z);
    const unsigned own = there && row_ >= 0 ? bits_of<T>(y) : 0U;
    const unsigned next =
        __shfl_down_sync(0xffffffffU, own, static_cast<unsigned>(lanes_));  // the next channel
    if (there && lane == 0 && i % 2 == 0) store_word(p_.words.y + channel / 2, own | next << 16, epoch);
    if (there && row_ >= 0) store_states(layer.ssm_state, state_at(channel), c_.state_dtype(), s);
  }
  static __device__ __forceinline__ void dot(uint2 a, uint2 b, float& sum) {
    float v[4];
    float w[4];
    widen<T>(a, v);
    widen<T>(b, w);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum = fmaf(v[j], w[j], sum);
  }
  // v /= its root mean square, rounded where it is; by a warp.
  __device__ __forceinline__ void normalize(T* v, int count) const {
    float square = 0.0F;
    for (int k = c_.lane; k < count; k += 32) {
      const float value = cuda::to_float(v[k]);
      square = fmaf(value, value, square);
    }
    const float rstd = 1.0F / sqrtf(cuda::warp_sum(square) / static_cast<float>(count) + p_.mixer_norm_eps);
    for (int k = c_.lane; k < count; k += 32) v[k] = cuda::from_float<T>(cuda::to_float(v[k]) * rstd);
  }

  __device__ __forceinline__ void finish(const LayerPointers& layer, unsigned epoch) {
    const float bias = Base::out_bias(layer);
    uint2 y[kInnerQuads];
    read_pairs(p_.words.y + part_.first / 2, part_.quads, epoch, y);
    c_.stage_plain(part_, y);
    Base::project_out(layer, bias, epoch);
  }

  const Share low_;
  const Part part_;
  const int lanes_;
#endif
};

}  // namespace

void launch_mamba1(Context& ctx, DType dtype, const DecodePlan& plan, const Params& params) {
  launch_decode<Mamba1Mixer>(ctx, dtype, plan, params);
}

}  // namespace krait::decode_detail
