#include <algorithm>
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "ops/norm/cuda/rows.cuh"
#include "ops/norm/cuda/shares.cuh"

namespace krait::norm_kernels {
namespace {

using cuda::kPack;

// Any strides, any mixture of dtypes: a block walks a group of its rows one after the other.
struct PlainBackward {
  GpuRows x, z, weight, bias, dout, dresidual, dx, dz;
  Sums sums;
  std::int64_t channels;
  Shares shares;
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
  for (std::int64_t unit = blockIdx.x; unit < p.shares.count * p.groups; unit += gridDim.x) {
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
    const Shares::Range range = p.shares.of(share);
    for (std::int64_t row = range.first; row < range.end; row += range.step) {
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

// One read and one write of every operand. A thread keeps the weights and the sums of its channels in
// registers over all rows of its share. It copies its own part of rows to shared memory ahead of their turn:
// that takes no barriers, and the memory is busy while sums are on their way through the block.
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
  std::int64_t channels;
  Shares shares;
  int groups;
  int group_size;
  float one_of_count;
  float eps;
  bool layer;
};

// z or dresidual.
template <typename T, typename X, Gate kGate>
using OtherOf = std::conditional_t<kGate == Gate::none, X, T>;

// Threads that a multiprocessor has registers for.
constexpr int threads_at_once(int vectors) { return vectors == 1 ? 768 : 512; }

// Bytes of a row in shared memory for each thread, and how many rows: one in turn and the others on their
// way.
template <typename T, typename X, int kVectors, Gate kGate>
inline constexpr int kRowBytes = kVectors* kPack* static_cast<int>(sizeof(X) + sizeof(T) +
                                                                   sizeof(OtherOf<T, X, kGate>));
constexpr int stages_of(int row_bytes, int threads) { return 3 * row_bytes * threads <= 192 * 1024 ? 3 : 2; }

template <typename T, typename X, int kVectors, Gate kGate, bool kBias>
__global__ void __launch_bounds__(threads_at_once(kVectors), 1) fast_backward(const FastBackward<T, X> p) {
  constexpr bool kGated = kGate != Gate::none;
  using Other = OtherOf<T, X, kGate>;
  constexpr int kChannels = kWidth<T, X>;
  constexpr int kPieces = kVectors * kPack / kChannels;
  constexpr int kStages = stages_of(kRowBytes<T, X, kVectors, kGate>, threads_at_once(kVectors));
  __shared__ float4 scratch[GroupSums<2>::kScratch];
  extern __shared__ uint4 staged[];
  const std::int64_t share = std::int64_t{blockIdx.x / p.groups} * blockDim.y + threadIdx.y;
  // Of several warps with rows of their own the last may have none; blocks of one group always have some.
  if (share >= p.shares.count) return;
  GroupSums<2> sum_up(scratch);
  const int place = first_channel<kPieces, kChannels>();
  const std::int64_t channel = place + static_cast<std::int64_t>(blockIdx.x % p.groups) * p.group_size;
  const auto holds = [&](int k) { return place + k * kStep<kChannels> < p.group_size; };

  // The pieces of a warp lie side by side.
  constexpr int kStageBytes = 32 * kRowBytes<T, X, kVectors, kGate>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto warp = static_cast<int>(threadIdx.y * (blockDim.x / 32) + threadIdx.x / 32);
  std::byte* const of_warp = reinterpret_cast<std::byte*>(staged) + warp * kStages * kStageBytes;
  const auto piece_of = [&]<typename E>(E, int stage, int bytes_before, int k) {
    return reinterpret_cast<Piece<E, kChannels>*>(of_warp + stage * kStageBytes + 32 * bytes_before) +
           k * 32 + lane;
  };
  const auto staged_x = [&](int stage, int k) { return piece_of(X{}, stage, 0, k); };
  constexpr int kBeforeDout = kVectors * kPack * sizeof(X);
  const auto staged_dout = [&](int stage, int k) { return piece_of(T{}, stage, kBeforeDout, k); };
  constexpr int kBeforeOther = kBeforeDout + kVectors * kPack * sizeof(T);
  const auto staged_other = [&](int stage, int k) { return piece_of(Other{}, stage, kBeforeOther, k); };

  const Shares::Range range = p.shares.of(share);
  std::int64_t row = range.first;
  std::int64_t next = row;  // to be copied
  const X* x_from = p.x.at(row, channel);
  const T* dout_from = p.dout.at(row, channel);
  const Other* other_from = nullptr;
  std::int64_t other_stride = 0;
  if constexpr (kGated) {
    other_from = p.z.at(row, channel);
    other_stride = range.step * p.z.stride;
  } else if (p.dresidual) {
    other_from = p.dresidual.at(row, channel);
    other_stride = range.step * p.dresidual.stride;
  }
  const auto copy_next = [&](int stage) {
    if (next < range.end) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        if (!holds(k)) continue;
        cuda::copy_async<sizeof(X) * kChannels>(staged_x(stage, k), x_from + k * kStep<kChannels>);
        cuda::copy_async<sizeof(T) * kChannels>(staged_dout(stage, k), dout_from + k * kStep<kChannels>);
        if (kGated || p.dresidual)
          cuda::copy_async<sizeof(Other) * kChannels>(staged_other(stage, k),
                                                      other_from + k * kStep<kChannels>);
      }
    }
    cuda::commit_copies();
    next += range.step;
    x_from += range.step * p.x.stride;
    dout_from += range.step * p.dout.stride;
    other_from += other_stride;
  };

  // Pieces beyond the group are zeros, which add nothing to sums.
  float weight[kPieces][kChannels] = {};
  float dweight[kPieces][kChannels] = {};
  float dbias[kBias ? kPieces : 1][kChannels] = {};
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (holds(k)) {
      p.weight.load(channel + k * kStep<kChannels>, 1.0F, weight[k]);
      continue;
    }
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      *staged_x(stage, k) = {};
      *staged_dout(stage, k) = {};
      *staged_other(stage, k) = {};
    }
  }
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) copy_next(ahead);
  X* dx_to = p.dx.at(row, channel);
  T* second_to = kGated ? p.dz.at(row, channel) : p.dx_rounded.at(row, channel);
  const std::int64_t second_stride = range.step * (kGated ? p.dz.stride : p.dx_rounded.stride);
  const bool second = kGated ? static_cast<bool>(p.dz) : static_cast<bool>(p.dx_rounded);
  for (int stage = 0; row < range.end; row += range.step, stage = stage == kStages - 1 ? 0 : stage + 1) {
    // What this writes over was read in the turn before.
    copy_next(stage == 0 ? kStages - 1 : stage - 1);
    cuda::wait_for_copies<kStages - 1>();

    float g[kPieces][kChannels];
    float sigmoid[kGated ? kPieces : 1][kChannels];  // of z
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const Piece<X, kChannels> x = *staged_x(stage, k);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) g[k][i] = float_of(x, i);
      if constexpr (kGated) {
        const Piece<Other, kChannels> z = *staged_other(stage, k);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          sigmoid[k][i] = cuda::quick_sigmoid(float_of(z, i));
          if constexpr (kGate == Gate::before_norm) g[k][i] *= float_of(z, i) * sigmoid[k][i];
        }
      }
    }
    // The gradient of h, the normalised values.
    const auto dh_of = [&](const Piece<T, kChannels>& dout, const Piece<Other, kChannels>& other, int k,
                           int i) {
      float dh = float_of(dout, i) * weight[k][i];
      if constexpr (kGate == Gate::after_norm) dh *= float_of(other, i) * sigmoid[k][i];
      return dh;
    };
    float dh_mean = 0.0F;
    if (p.layer) {
      float means[2] = {0.0F, 0.0F};  // of g and dh
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        const Piece<T, kChannels> dout = *staged_dout(stage, k);
        Piece<Other, kChannels> other;
        if constexpr (kGated) other = *staged_other(stage, k);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          means[0] += g[k][i];
          means[1] += dh_of(dout, other, k, i);
        }
      }
      sum_up(means);
      dh_mean = means[1] * p.one_of_count;
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) g[k][i] = holds(k) ? g[k][i] - means[0] * p.one_of_count : 0.0F;
      }
    }
    float sums[2] = {0.0F, 0.0F};  // of g^2 and dh g
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const Piece<T, kChannels> dout = *staged_dout(stage, k);
      Piece<Other, kChannels> other;
      if constexpr (kGated) other = *staged_other(stage, k);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        sums[0] = fmaf(g[k][i], g[k][i], sums[0]);
        sums[1] = fmaf(dh_of(dout, other, k, i), g[k][i], sums[1]);
      }
    }
    sum_up(sums);
    const float rstd = rsqrtf(fmaf(sums[0], p.one_of_count, p.eps));
    // dx = rstd (dh - mean(dh) - h mean(dh h)), h = g rstd
    const float of_g = -(sums[1] * p.one_of_count * rstd * rstd * rstd);
    const float constant = -rstd * dh_mean;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const Piece<T, kChannels> dout = *staged_dout(stage, k);
      Piece<X, kChannels> x;
      if constexpr (kGate == Gate::before_norm) x = *staged_x(stage, k);
      Piece<Other, kChannels> other;
      if (kGated || p.dresidual) other = *staged_other(stage, k);
      float bias[kChannels];
      if constexpr (kGate == Gate::after_norm)
        if (holds(k)) p.bias.load(channel + k * kStep<kChannels>, 0.0F, bias);
      float dx[kChannels];
      float dz[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        float dn = float_of(dout, i);
        float gate = 1.0F;
        float slope = 0.0F;
        if constexpr (kGated) {
          gate = float_of(other, i) * sigmoid[k][i];
          slope = fmaf(gate, 1.0F - sigmoid[k][i], sigmoid[k][i]);
        }
        if constexpr (kGate == Gate::after_norm) {
          dz[i] = dn * fmaf(g[k][i] * rstd, weight[k][i], bias[i]) * slope;
          dn *= gate;
        }
        if constexpr (kBias) dbias[k][i] += dn;
        dn *= rstd;
        dweight[k][i] = fmaf(dn, g[k][i], dweight[k][i]);
        dx[i] = fmaf(dn, weight[k][i], fmaf(of_g, g[k][i], constant));
        if constexpr (kGate == Gate::before_norm) {
          dz[i] = dx[i] * float_of(x, i) * slope;
          dx[i] *= gate;
        }
        if (!kGated && p.dresidual) dx[i] += float_of(other, i);
      }
      if (!holds(k)) continue;
      if (p.dx) store_piece(dx_to + k * kStep<kChannels>, dx);
      if (second) store_piece(second_to + k * kStep<kChannels>, kGated ? dz : dx);
    }
    dx_to += range.step * p.dx.stride;
    second_to += second_stride;
  }
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (!holds(k)) continue;
    const std::int64_t to = share * p.channels + channel + k * kStep<kChannels>;
    if (p.sums.dweight != nullptr) store_piece(p.sums.dweight + to, dweight[k]);
    if constexpr (kBias) store_piece(p.sums.dbias + to, dbias[k]);
  }
}

template <typename T, typename X, int kVectors, Gate kGate>
std::size_t shared_bytes(const GpuPlan& plan) {
  constexpr int kRow = kRowBytes<T, X, kVectors, kGate>;
  return static_cast<std::size_t>(plan.warps) * plan.groups * 32 * kRow *
         stages_of(kRow, threads_at_once(kVectors));
}

// f(kernel, bytes of shared memory) with the kernel that suits.
template <typename T, typename X, typename F>
void with_fast(const BackwardProblem& p, const GpuPlan& plan, F&& f) {
  const auto call = [&]<Gate kGate, bool kBias>() {
    const auto with = [&]<int kVectors>() {
      f(fast_backward<T, X, kVectors, kGate, kBias>, shared_bytes<T, X, kVectors, kGate>(plan));
    };
    return plan.vectors == 1 ? with.template operator()<1>() : with.template operator()<2>();
  };
  if constexpr (std::is_same_v<T, X>)
    if (p.z)
      return p.norm_before_gate ? call.template operator()<Gate::after_norm, false>()
                                : call.template operator()<Gate::before_norm, false>();
  if (p.dbias) return call.template operator()<Gate::none, true>();
  return call.template operator()<Gate::none, false>();
}

void run_plain(Context& ctx, const BackwardProblem& p) {
  const Shares shares = shares_of(ctx, p, 4, 1);
  const std::int64_t groups = p.channels / p.group_size;
  const Partial partial(ctx, p, shares.count);
  const PlainBackward problem{.x = GpuRows(p.x),
                              .z = GpuRows(p.z),
                              .weight = GpuRows(p.weight),
                              .bias = GpuRows(p.bias),
                              .dout = GpuRows(p.dout),
                              .dresidual = GpuRows(p.dresidual),
                              .dx = GpuRows(p.dx),
                              .dz = GpuRows(p.dz),
                              .sums = partial.sums,
                              .channels = p.channels,
                              .shares = shares,
                              .groups = groups,
                              .group_size = p.group_size,
                              .eps = static_cast<float>(p.eps),
                              .layer = p.kind == NormKind::layer,
                              .norm_before_gate = p.norm_before_gate};
  const auto threads = static_cast<unsigned>(std::min<std::int64_t>((p.group_size + 31) / 32 * 32, 256));
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(shares.count * groups, 1 << 30));
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
    const Shares shares =
        shares_of(ctx, p, resident_blocks(ctx, threads, shared, threads_at_once(plan.vectors)), plan.groups);
    const std::int64_t groups = p.channels / p.group_size;
    const Partial partial(ctx, p, shares.count);
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
                                     .channels = p.channels,
                                     .shares = shares,
                                     .groups = static_cast<int>(groups),
                                     .group_size = static_cast<int>(p.group_size),
                                     .one_of_count = 1.0F / static_cast<float>(p.group_size),
                                     .eps = static_cast<float>(p.eps),
                                     .layer = p.kind == NormKind::layer};
    const std::int64_t blocks = (shares.count + plan.groups - 1) / plan.groups * groups;
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
  // The sums of shares are added by a kernel that waits in the multiprocessors for the one in front of it.
  const OverlappingKernels overlap(ctx);
  bool done = false;
  if (plan.vectors > 0)
    dispatch_pair(p.dout.dtype(), p.x.dtype(),
                  [&](auto t, auto x) { done = run_fast<decltype(t), decltype(x)>(ctx, p, plan); });
  if (!done) run_plain(ctx, p);
  return done;
}

}  // namespace krait::norm_kernels
