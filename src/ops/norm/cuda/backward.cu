#include <type_traits>

#include "ops/norm/cuda/rows.cuh"

namespace krait::norm_kernels {
namespace {

using cuda::kPack;
using cuda::Pack;

// Sums over rows are collected in `shares` of rows, each the work of one block (or of a warp of one), as rows
// of (shares, channels) f32 that a second kernel adds in their order.
struct Sums {
  float* dweight = nullptr;
  float* dbias = nullptr;
};

// Any strides, any mixture of dtypes: a block walks a group of its rows one after the other.
struct PlainBackward {
  GpuRows x, z, weight, bias, dout, dresidual, dx, dz;
  Sums sums;
  std::int64_t rows;
  std::int64_t channels;
  std::int64_t shares;
  std::int64_t groups;
  std::int64_t group_size;
  float eps;
  bool layer;
  bool norm_before_gate;
};

__global__ void plain_backward(const PlainBackward p) {
  __shared__ float scratch[33];
  const auto count = static_cast<float>(p.group_size);
  const GpuRows::Row weight = p.weight.row(0);
  const GpuRows::Row bias = p.bias.row(0);
  const bool gate_first = p.z.data != nullptr && !p.norm_before_gate;
  const bool gate_last = p.z.data != nullptr && p.norm_before_gate;
  for (std::int64_t unit = blockIdx.x; unit < p.shares * p.groups; unit += gridDim.x) {
    const std::int64_t share = unit / p.groups;
    const std::int64_t first = unit % p.groups * p.group_size;
    const std::int64_t end = first + p.group_size;
    float* dweight = p.sums.dweight == nullptr ? nullptr : p.sums.dweight + share * p.channels;
    float* dbias = p.sums.dbias == nullptr ? nullptr : p.sums.dbias + share * p.channels;
    // A channel of a share belongs to one thread, which alone adds to it.
    for (std::int64_t c = first + threadIdx.x; c < end; c += blockDim.x) {
      if (dweight != nullptr) dweight[c] = 0.0F;
      if (dbias != nullptr) dbias[c] = 0.0F;
    }
    const std::int64_t last_row = p.rows * (share + 1) / p.shares;
    for (std::int64_t row = p.rows * share / p.shares; row < last_row; ++row) {
      const GpuRows::Row x = p.x.row(row);
      const GpuRows::Row z = p.z.row(row);
      const GpuRows::Row dout = p.dout.row(row);
      const GpuRows::Row dresidual = p.dresidual.row(row);
      const GpuRows::Row dx = p.dx.row(row);
      const GpuRows::Row dz = p.dz.row(row);
      const auto gated = [&](std::int64_t c) {
        return gate_first ? x.load(c, 0.0F) * cuda::silu(z.load(c, 0.0F)) : x.load(c, 0.0F);
      };
      // The gradient of the normalised values times weight plus bias.
      const auto dn_of = [&](std::int64_t c) {
        const float d = dout.load(c, 0.0F);
        return gate_last ? d * cuda::silu(z.load(c, 0.0F)) : d;
      };
      float mean = 0.0F;
      if (p.layer) {
        for (std::int64_t c = first + threadIdx.x; c < end; c += blockDim.x) mean += gated(c);
        mean = cuda::block_sum(mean, scratch) / count;
      }
      float square = 0.0F;
      float dh_sum = 0.0F;
      float product = 0.0F;
      for (std::int64_t c = first + threadIdx.x; c < end; c += blockDim.x) {
        const float g = gated(c) - mean;
        const float dh = dn_of(c) * weight.load(c, 1.0F);
        square += g * g;
        dh_sum += dh;
        product += dh * g;
      }
      const float rstd = 1.0F / sqrtf(cuda::block_sum(square, scratch) / count + p.eps);
      dh_sum = p.layer ? cuda::block_sum(dh_sum, scratch) / count : 0.0F;
      product = cuda::block_sum(product, scratch) * rstd / count;
      for (std::int64_t c = first + threadIdx.x; c < end; c += blockDim.x) {
        const float x_c = x.load(c, 0.0F);
        const float z_c = z.load(c, 0.0F);
        const float sigmoid = cuda::sigmoid(z_c);
        const float gate = z_c * sigmoid;
        const float h = ((gate_first ? x_c * gate : x_c) - mean) * rstd;
        const float w = weight.load(c, 1.0F);
        const float d = dout.load(c, 0.0F);
        const float dn = gate_last ? d * gate : d;
        float dr = rstd * (dn * w - dh_sum - h * product);
        if (gate_last) dz.store(c, d * (h * w + bias.load(c, 0.0F)) * cuda::silu_slope(z_c, sigmoid));
        if (gate_first) {
          // dout may be dz: it was read above.
          dz.store(c, dr * x_c * cuda::silu_slope(z_c, sigmoid));
          dr *= gate;
        }
        if (dweight != nullptr) dweight[c] += dn * h;
        if (dbias != nullptr) dbias[c] += dn;
        if (dx) dx.store(c, dr + dresidual.load(c, 0.0F));
      }
    }
  }
}

enum class Gate : std::uint8_t { none, before_norm, after_norm };

// One read and one write of every operand. A thread keeps the sums of its channels in registers over all rows
// of its share. Rows are copied to shared memory ahead of time, each thread's part by itself: no barriers,
// and the memory is busy while sums are on their way through the block.
template <typename T, typename X>
struct FastBackward {
  PackedRows<X> x;
  PackedRows<T> z;
  PackedVector weight, bias;
  PackedRows<T> dout;
  PackedRows<X> dresidual;
  PackedRows<X> dx;
  PackedRows<T> dx_rounded;
  PackedRows<T> dz;
  Sums sums;
  std::int64_t rows;
  std::int64_t channels;
  std::int64_t shares;
  int groups;
  int group_size;
  float eps;
  bool layer;
};

// Rows in shared memory, one in turn and the others on their way: as many as fit for the largest block.
template <typename T, typename X, int kVectors, Gate kGate>
inline constexpr int kRowSlots = kVectors*(kSlots<X> + kSlots<T> +
                                           kSlots<std::conditional_t<kGate == Gate::none, X, T>>);
template <int kSlotsOfRow>
inline constexpr int kStagesFor = kSlotsOfRow <= 6   ? 4
                                  : kSlotsOfRow <= 9 ? 3
                                                     : 2;
// Threads that a multiprocessor has registers for.
constexpr int threads_at_once(int vectors) { return vectors == 3 ? 384 : 512; }

template <typename T, typename X, int kVectors, Gate kGate, bool kBias>
__global__ void __launch_bounds__(32 * most_warps(kVectors),
                                  threads_at_once(kVectors) / 32 / most_warps(kVectors))
    fast_backward(const FastBackward<T, X> p) {
  __shared__ float scratch[GroupSums<3>::kFloats];
  __shared__ float mean_scratch[GroupSums<1>::kFloats];
  extern __shared__ uint4 staged[];
  constexpr bool kGated = kGate != Gate::none;
  using Other = std::conditional_t<kGated, T, X>;  // z or dresidual
  constexpr int kDout = kVectors * kSlots<X>;      // the first slot of dout
  constexpr int kOther = kDout + kVectors * kSlots<T>;
  constexpr int kSlotsOfRow = kRowSlots<T, X, kVectors, kGate>;
  constexpr int kStages = kStagesFor<kSlotsOfRow>;
  const Stages stages(staged, kSlotsOfRow);
  GroupSums<3> sum_up(scratch);
  GroupSums<1> sum_up_one(mean_scratch);
  const auto count = static_cast<float>(p.group_size);
  const int place = first_channel<kVectors>();
  const auto holds = [&](int k) { return place + k * kStep < p.group_size; };
  const auto left = [&](int k) {  // of the group, from the warp's first channel on
    return p.group_size - (place - static_cast<int>(threadIdx.x) % 32 * kPack) - k * kStep;
  };
  const std::int64_t channel = place + static_cast<std::int64_t>(blockIdx.x % p.groups) * p.group_size;
  const std::int64_t share = std::int64_t{blockIdx.x / p.groups} * blockDim.y + threadIdx.y;
  // Of several warps with rows of their own the last may have none; blocks of one group always have some.
  if (share >= p.shares) return;

  const std::int64_t end = p.rows * (share + 1) / p.shares;
  const auto copy = [&](std::int64_t row, int stage) {
    if (row < end) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        stages.copy(stage, k * kSlots<X>, p.x.at(row, channel) + k * kStep, left(k));
        stages.copy(stage, kDout + k * kSlots<T>, p.dout.at(row, channel) + k * kStep, left(k));
        if constexpr (kGated)
          stages.copy(stage, kOther + k * kSlots<Other>, p.z.at(row, channel) + k * kStep, left(k));
        else if (p.dresidual)
          stages.copy(stage, kOther + k * kSlots<Other>, p.dresidual.at(row, channel) + k * kStep, left(k));
      }
    }
    cuda::commit_copies();
  };

  float dweight[kVectors][kPack] = {};
  float dbias[kBias ? kVectors : 1][kPack] = {};
  std::int64_t row = p.rows * share / p.shares;
  int stage = 0;
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) copy(row + ahead, ahead);
  for (; row < end; ++row, stage = (stage + 1) % kStages) {
    // What this writes over was read in the turn before, by this warp.
    stages.meet();
    copy(row + kStages - 1, (stage + kStages - 1) % kStages);
    cuda::wait_for_copies<kStages - 1>();
    stages.meet();

    float g[kVectors][kPack];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!holds(k)) continue;
      const Pack<X> x = stages.read<X>(stage, k * kSlots<X>);
#pragma unroll
      for (int i = 0; i < kPack; ++i) g[k][i] = cuda::float_of(x, i);
      if constexpr (kGate == Gate::before_norm) {
        const Pack<Other> z = stages.read<Other>(stage, kOther + k * kSlots<Other>);
#pragma unroll
        for (int i = 0; i < kPack; ++i) g[k][i] *= cuda::quick_silu(cuda::float_of(z, i));
      }
    }
    if (p.layer) {
      float mean[1] = {0.0F};
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (!holds(k)) continue;
#pragma unroll
        for (int i = 0; i < kPack; ++i) mean[0] += g[k][i];
      }
      sum_up_one(mean);
      mean[0] /= count;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) g[k][i] -= mean[0];
      }
    }
    float sums[3] = {0.0F, 0.0F, 0.0F};  // of g^2, dh and dh g
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!holds(k)) continue;
      float dh_of[kPack];
      p.weight.load(channel + k * kStep, 1.0F, dh_of);
      const Pack<T> dout = stages.read<T>(stage, kDout + k * kSlots<T>);
#pragma unroll
      for (int i = 0; i < kPack; ++i) dh_of[i] *= cuda::float_of(dout, i);
      if constexpr (kGate == Gate::after_norm) {
        const Pack<Other> z = stages.read<Other>(stage, kOther + k * kSlots<Other>);
#pragma unroll
        for (int i = 0; i < kPack; ++i) dh_of[i] *= cuda::quick_silu(cuda::float_of(z, i));
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float dh = dh_of[i];
        sums[0] = fmaf(g[k][i], g[k][i], sums[0]);
        sums[1] += dh;
        sums[2] = fmaf(dh, g[k][i], sums[2]);
      }
    }
    sum_up(sums);
    const float rstd = 1.0F / sqrtf(sums[0] / count + p.eps);
    const float dh_mean = p.layer ? sums[1] / count : 0.0F;
    const float product = sums[2] * rstd / count;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float dx[kPack];
      float dz[kPack];
      if (holds(k)) {
        float w[kPack];
        float b[kPack];
        p.weight.load(channel + k * kStep, 1.0F, w);
        if constexpr (kGate == Gate::after_norm) p.bias.load(channel + k * kStep, 0.0F, b);
        const Pack<X> x = stages.read<X>(stage, k * kSlots<X>);
        const Pack<T> dout = stages.read<T>(stage, kDout + k * kSlots<T>);
        Pack<Other> other;
        if (kGated || p.dresidual) other = stages.read<Other>(stage, kOther + k * kSlots<Other>);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const float h = g[k][i] * rstd;
          float dn = cuda::float_of(dout, i);
          float gate = 1.0F;
          float slope = 0.0F;
          if constexpr (kGated) {
            const float z = cuda::float_of(other, i);
            const float sigmoid = cuda::quick_sigmoid(z);
            gate = z * sigmoid;
            slope = cuda::silu_slope(z, sigmoid);
            if constexpr (kGate == Gate::after_norm) {
              dz[i] = dn * fmaf(h, w[i], b[i]) * slope;
              dn *= gate;
            }
          }
          dx[i] = rstd * (dn * w[i] - dh_mean - h * product);
          dweight[k][i] = fmaf(dn, h, dweight[k][i]);
          if constexpr (kBias) dbias[k][i] += dn;
          if constexpr (kGated) {
            if constexpr (kGate == Gate::before_norm) {
              dz[i] = dx[i] * cuda::float_of(x, i) * slope;
              dx[i] *= gate;
            }
          } else if (p.dresidual) {
            dx[i] += cuda::float_of(other, i);
          }
        }
      }
      if (p.dx) stages.store(stage, k * kSlots<X>, p.dx.at(row, channel) + k * kStep, left(k), dx);
      if (!kGated && p.dx_rounded)
        stages.store(stage, kDout + k * kSlots<T>, p.dx_rounded.at(row, channel) + k * kStep, left(k), dx);
      if (kGated && p.dz)
        stages.store(stage, kOther + k * kSlots<T>, p.dz.at(row, channel) + k * kStep, left(k), dz);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if (!holds(k)) continue;
    const std::int64_t to = share * p.channels + channel + k * kStep;
    if (p.sums.dweight != nullptr) cuda::store_pack(p.sums.dweight + to, dweight[k]);
    if constexpr (kBias) cuda::store_pack(p.sums.dbias + to, dbias[k]);
  }
}

// to[c] += the sum of partial[s][c] over all shares s: a thread takes every kDepth-th share of a channel, and
// what they found is added pairwise. Few channels a block: the time is that of a thread's loads.
constexpr int kWidth = 8;
constexpr int kDepth = 64;

__global__ void add_shares(const float* partial, std::int64_t shares, std::int64_t channels, float* to,
                           std::int64_t stride) {
  __shared__ float found[kDepth][kWidth];
  const std::int64_t c = std::int64_t{blockIdx.x} * kWidth + threadIdx.x;
  float sum = 0.0F;
  if (c < channels) {
#pragma unroll 16
    for (std::int64_t s = threadIdx.y; s < shares; s += kDepth) sum += partial[s * channels + c];
  }
  found[threadIdx.y][threadIdx.x] = sum;
  for (unsigned half = kDepth / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) found[threadIdx.y][threadIdx.x] += found[threadIdx.y + half][threadIdx.x];
  }
  if (threadIdx.y == 0 && c < channels) to[c * stride] += found[0][threadIdx.x];
}

void add_up(Context& ctx, const Tensor& partial, const Rows& to) {
  const std::int64_t channels = partial.size(1);
  cuda::launch(ctx, "norm_backward", add_shares,
               dim3(static_cast<unsigned>((channels + kWidth - 1) / kWidth)), dim3(kWidth, kDepth), 0,
               partial.data<float>(), partial.size(0), channels, to.row(0), to.channel_stride());
}

template <typename T, typename X, int kVectors, Gate kGate>
std::size_t shared_bytes(const GpuPlan& plan) {
  constexpr int kRow = kRowSlots<T, X, kVectors, kGate>;
  return static_cast<std::size_t>(plan.warps) * plan.groups * 32 * kStagesFor<kRow> * kRow * 16;
}

// f(kernel, bytes of shared memory) with the kernel that suits.
template <typename T, typename X, typename F>
void with_fast(const BackwardProblem& p, const GpuPlan& plan, F&& f) {
  const auto call = [&]<Gate kGate, bool kBias>() {
    const auto with = [&]<int kVectors>() {
      f(fast_backward<T, X, kVectors, kGate, kBias>, shared_bytes<T, X, kVectors, kGate>(plan));
    };
    switch (plan.vectors) {
      case 1: return with.template operator()<1>();
      case 2: return with.template operator()<2>();
      default: return with.template operator()<3>();
    }
  };
  if constexpr (std::is_same_v<T, X>)
    if (p.z)
      return p.norm_before_gate ? call.template operator()<Gate::after_norm, false>()
                                : call.template operator()<Gate::before_norm, false>();
  if (p.dbias) return call.template operator()<Gate::none, true>();
  return call.template operator()<Gate::none, false>();
}

// Shares to fill the device once, of rows enough to be worth their sums.
std::int64_t shares_of(const Context& ctx, const BackwardProblem& p, std::int64_t blocks_each,
                       int side_by_side) {
  const std::int64_t blocks = blocks_each * cuda::limits_of(ctx).multiprocessors;
  const std::int64_t wanted = std::max<std::int64_t>(blocks / (p.channels / p.group_size), 1) * side_by_side;
  return std::min(wanted, std::max<std::int64_t>(p.rows / 8, 1));
}

// Where blocks put the sums of their shares.
struct Partial {
  Tensor dweight;
  Tensor dbias;
  Sums sums;

  Partial(Context& ctx, const BackwardProblem& p, std::int64_t shares) {
    if (p.dweight) dweight = ctx.empty({shares, p.channels});
    if (p.dbias) dbias = ctx.empty({shares, p.channels});
    sums = {.dweight = dweight ? dweight.data<float>() : nullptr,
            .dbias = dbias ? dbias.data<float>() : nullptr};
  }
  void add_to(Context& ctx, const BackwardProblem& p) const {
    if (dweight) add_up(ctx, dweight, p.dweight);
    if (dbias) add_up(ctx, dbias, p.dbias);
  }
};

void run_plain(Context& ctx, const BackwardProblem& p) {
  const std::int64_t shares = shares_of(ctx, p, 4, 1);
  const std::int64_t groups = p.channels / p.group_size;
  const Partial partial(ctx, p, shares);
  const PlainBackward problem{.x = GpuRows(p.x),
                              .z = GpuRows(p.z),
                              .weight = GpuRows(p.weight),
                              .bias = GpuRows(p.bias),
                              .dout = GpuRows(p.dout),
                              .dresidual = GpuRows(p.dresidual),
                              .dx = GpuRows(p.dx),
                              .dz = GpuRows(p.dz),
                              .sums = partial.sums,
                              .rows = p.rows,
                              .channels = p.channels,
                              .shares = shares,
                              .groups = groups,
                              .group_size = p.group_size,
                              .eps = static_cast<float>(p.eps),
                              .layer = p.kind == NormKind::layer,
                              .norm_before_gate = p.norm_before_gate};
  const auto threads = static_cast<unsigned>(std::min<std::int64_t>((p.group_size + 31) / 32 * 32, 256));
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(shares * groups, 1 << 30));
  cuda::launch(ctx, "norm_backward", plain_backward, dim3(blocks), dim3(threads), 0, problem);
  partial.add_to(ctx, p);
}

// False where the device has too little shared memory for the plan.
template <typename T, typename X>
bool run_fast(Context& ctx, const BackwardProblem& p, const GpuPlan& plan) {
  bool done = false;
  with_fast<T, X>(p, plan, [&](auto* kernel, std::size_t shared) {
    if (!shared_memory_suffices(ctx, shared)) return;
    const int threads = plan.warps * plan.groups * 32;
    const std::int64_t shares =
        shares_of(ctx, p, resident_blocks(ctx, threads, shared, threads_at_once(plan.vectors)), plan.groups);
    const std::int64_t groups = p.channels / p.group_size;
    const Partial partial(ctx, p, shares);
    const FastBackward<T, X> problem{.x = PackedRows<X>(p.x),
                                     .z = PackedRows<T>(p.z),
                                     .weight = PackedVector(p.weight),
                                     .bias = PackedVector(p.bias),
                                     .dout = PackedRows<T>(p.dout),
                                     .dresidual = PackedRows<X>(p.dresidual),
                                     .dx = PackedRows<X>(p.dx),
                                     .dx_rounded = PackedRows<T>(p.dx_rounded),
                                     .dz = PackedRows<T>(p.dz),
                                     .sums = partial.sums,
                                     .rows = p.rows,
                                     .channels = p.channels,
                                     .shares = shares,
                                     .groups = static_cast<int>(groups),
                                     .group_size = static_cast<int>(p.group_size),
                                     .eps = static_cast<float>(p.eps),
                                     .layer = p.kind == NormKind::layer};
    const std::int64_t blocks = (shares + plan.groups - 1) / plan.groups * groups;
    cuda::launch(ctx, "norm_backward", kernel, dim3(static_cast<unsigned>(blocks)),
                 dim3(static_cast<unsigned>(plan.warps) * 32, static_cast<unsigned>(plan.groups)), shared,
                 problem);
    partial.add_to(ctx, p);
    done = true;
  });
  return done;
}

}  // namespace

bool cuda(Context& ctx, const BackwardProblem& p, const GpuPlan& plan) {
  bool done = false;
  if (plan.vectors > 0)
    dispatch_pair(p.dout.dtype(), p.x.dtype(),
                  [&](auto t, auto x) { done = run_fast<decltype(t), decltype(x)>(ctx, p, plan); });
  if (!done) run_plain(ctx, p);
  return done;
}

}  // namespace krait::norm_kernels
