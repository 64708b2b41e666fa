#include <algorithm>
#include <type_traits>

#include "ops/norm/cuda/rows.cuh"

namespace krait::norm_kernels {
namespace {

using cuda::kPack;

// Any strides, any mixture of dtypes: a block walks a group of a row three times.
struct PlainForward {
  GpuRows x, residual, z, weight, bias, out, residual_out;
  std::int64_t units;   // groups of all rows
  std::int64_t groups;  // of a row
  std::int64_t group_size;
  float eps;
  bool layer;
  bool norm_before_gate;
};

__global__ void plain_forward(const PlainForward p) {
  __shared__ float scratch[33];
  const auto count = static_cast<float>(p.group_size);
  const GpuRows::Row weight = p.weight.row(0);
  const GpuRows::Row bias = p.bias.row(0);
  for (std::int64_t unit = blockIdx.x; unit < p.units; unit += gridDim.x) {
    const std::int64_t row = unit / p.groups;
    const std::int64_t first = unit % p.groups * p.group_size;
    const std::int64_t end = first + p.group_size;
    const GpuRows::Row x = p.x.row(row);
    const GpuRows::Row residual = p.residual.row(row);
    const GpuRows::Row z = p.z.row(row);
    const GpuRows::Row out = p.out.row(row);
    const GpuRows::Row residual_out = p.residual_out.row(row);
    const bool gate_first = z && !p.norm_before_gate;
    const auto summed = [&](std::int64_t c) { return x.load(c, 0.0F) + residual.load(c, 0.0F); };
    const auto gated = [&](std::int64_t c) {
      return gate_first ? summed(c) * cuda::silu(z.load(c, 0.0F)) : summed(c);
    };

    float mean = 0.0F;
    if (p.layer) {
      for (std::int64_t c = first + threadIdx.x; c < end; c += blockDim.x) mean += gated(c);
      mean = cuda::block_sum(mean, scratch) / count;
    }
    float square = 0.0F;
    for (std::int64_t c = first + threadIdx.x; c < end; c += blockDim.x) {
      const float d = gated(c) - mean;
      square += d * d;
    }
    // A group is read to its end, by all threads, before any of it is overwritten.
    const float rstd = 1.0F / sqrtf(cuda::block_sum(square, scratch) / count + p.eps);
    for (std::int64_t c = first + threadIdx.x; c < end; c += blockDim.x) {
      const float r = summed(c);
      const float gate = z ? cuda::silu(z.load(c, 0.0F)) : 1.0F;
      const float g = gate_first ? r * gate : r;
      float n = (g - mean) * rstd * weight.load(c, 1.0F) + bias.load(c, 0.0F);
      if (!gate_first) n *= gate;
      residual_out.store(c, r);
      out.store(c, n);
    }
  }
}

// One read and one write of every operand: a thread asks for its channels of a group at once and holds them
// in registers. A group is the work of a block, or of one of its warps, which then ends: while it adds up,
// other blocks of the multiprocessor load, and new blocks go to who is done first. Without a gate, x +
// residual or one of them; with one, x alone.
template <typename T, typename R>
struct FastForward {
  PackedRows<T> x;
  PackedRows<R> residual;
  PackedRows<T> z;
  PackedVector weight, bias;
  PackedRows<T> out;
  PackedRows<R> residual_out;
  std::int64_t first;  // of the units
  std::int64_t units;
  std::int64_t groups;
  int group_size;
  float one_of_count;
  float eps;
  bool layer;
};

// Threads that a multiprocessor has registers for.
constexpr int threads_at_once(int vectors) { return vectors == 1 ? 1536 : vectors == 2 ? 1280 : 1024; }

template <typename T, typename R, int kVectors, Gate kGate>
__global__ void __launch_bounds__(threads_at_once(kVectors) / 2, 2) fast_forward(const FastForward<T, R> p) {
  constexpr bool kGated = kGate != Gate::none;
  using Other = std::conditional_t<kGated, T, R>;  // z or residual
  constexpr int kChannels = kWidth<T, Other>;
  constexpr int kPieces = kVectors * kPack / kChannels;
  __shared__ float4 scratch[GroupSums<1>::kScratch];
  const std::int64_t unit = p.first + std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  // Of several warps with groups of their own the last may have none; blocks of one group always have one.
  if (unit >= p.units) return;
  GroupSums<1> sum_up(scratch);
  const std::int64_t row = p.groups == 1 ? unit : unit / p.groups;
  const int place = first_channel<kPieces, kChannels>();
  const std::int64_t channel = place + (p.groups == 1 ? 0 : (unit - row * p.groups) * p.group_size);
  const auto holds = [&](int k) { return place + k * kStep<kChannels> < p.group_size; };

  Piece<T, kChannels> x[kPieces];
  Piece<Other, kChannels> other[kPieces];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (!holds(k)) continue;
    if (kGated || p.x) x[k] = load_piece<kChannels>(p.x.at(row, channel) + k * kStep<kChannels>);
    if constexpr (kGated)
      other[k] = load_piece<kChannels>(p.z.at(row, channel) + k * kStep<kChannels>);
    else if (p.residual)
      other[k] = load_piece<kChannels>(p.residual.at(row, channel) + k * kStep<kChannels>);
  }
  float g[kPieces][kChannels];
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (!holds(k)) continue;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      g[k][i] = kGated || p.x ? float_of(x[k], i) : 0.0F;
      if constexpr (kGate == Gate::before_norm)
        g[k][i] *= cuda::quick_silu(float_of(other[k], i));
      else if (!kGated && p.residual)
        g[k][i] += float_of(other[k], i);
    }
    if constexpr (!kGated)
      if (p.residual_out) store_piece(p.residual_out.at(row, channel) + k * kStep<kChannels>, g[k]);
  }
  if (p.layer) {
    float mean[1] = {0.0F};
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      if (!holds(k)) continue;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) mean[0] += g[k][i];
    }
    sum_up(mean);
    mean[0] *= p.one_of_count;
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) g[k][i] -= mean[0];
    }
  }
  // Of differences, from the values in registers: nothing cancels where the mean is large.
  float square[1] = {0.0F};
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (!holds(k)) continue;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) square[0] = fmaf(g[k][i], g[k][i], square[0]);
  }
  sum_up(square);
  const float rstd = rsqrtf(fmaf(square[0], p.one_of_count, p.eps));
  // The weight comes from the first-level cache, where the blocks before left it: in registers since before
  // the sum it would take the place of other blocks.
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (!holds(k)) continue;
    float weight[kChannels];
    p.weight.load(channel + k * kStep<kChannels>, 1.0F, weight);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) g[k][i] *= rstd * weight[i];
    if (p.bias) {
      float bias[kChannels];
      p.bias.load(channel + k * kStep<kChannels>, 0.0F, bias);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) g[k][i] += bias[i];
    }
    if constexpr (kGate == Gate::after_norm) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) g[k][i] *= cuda::quick_silu(float_of(other[k], i));
    }
    store_piece(p.out.at(row, channel) + k * kStep<kChannels>, g[k]);
  }
}

template <typename T, typename R, int kVectors, Gate kGate>
void launch_fast(Context& ctx, const GpuPlan& plan, FastForward<T, R> problem) {
  constexpr std::int64_t kMostBlocks = 1 << 30;
  const dim3 threads(static_cast<unsigned>(plan.warps) * 32, static_cast<unsigned>(plan.groups));
  for (; problem.first < problem.units; problem.first += kMostBlocks * plan.groups) {
    const std::int64_t blocks = (problem.units - problem.first + plan.groups - 1) / plan.groups;
    cuda::launch(ctx, "norm", fast_forward<T, R, kVectors, kGate>,
                 dim3(static_cast<unsigned>(std::min(blocks, kMostBlocks))), threads, 0, problem);
  }
}

template <typename T, typename R, Gate kGate>
void launch_fast(Context& ctx, const GpuPlan& plan, const FastForward<T, R>& problem) {
  switch (plan.vectors) {
    case 1: return launch_fast<T, R, 1, kGate>(ctx, plan, problem);
    case 2: return launch_fast<T, R, 2, kGate>(ctx, plan, problem);
    default: return launch_fast<T, R, 4, kGate>(ctx, plan, problem);
  }
}

void run_plain(Context& ctx, const Problem& p) {
  const std::int64_t groups = p.channels / p.group_size;
  const std::int64_t units = p.rows * groups;
  const PlainForward problem{.x = GpuRows(p.x),
                             .residual = GpuRows(p.residual),
                             .z = GpuRows(p.z),
                             .weight = GpuRows(p.weight),
                             .bias = GpuRows(p.bias),
                             .out = GpuRows(p.out),
                             .residual_out = GpuRows(p.residual_out),
                             .units = units,
                             .groups = groups,
                             .group_size = p.group_size,
                             .eps = static_cast<float>(p.eps),
                             .layer = p.kind == NormKind::layer,
                             .norm_before_gate = p.norm_before_gate};
  const auto threads = static_cast<unsigned>(std::min<std::int64_t>((p.group_size + 31) / 32 * 32, 256));
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(units, 1 << 30));
  cuda::launch(ctx, "norm", plain_forward, dim3(blocks), dim3(threads), 0, problem);
}

void run_fast(Context& ctx, const Problem& p, const GpuPlan& plan) {
  const std::int64_t groups = p.channels / p.group_size;
  const DType residual = p.residual       ? p.residual.dtype()
                         : p.residual_out ? p.residual_out.dtype()
                                          : p.out.dtype();
  dispatch_pair(p.out.dtype(), residual, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    const FastForward<T, R> problem{.x = PackedRows<T>(p.x),
                                    .residual = PackedRows<R>(p.residual),
                                    .z = PackedRows<T>(p.z),
                                    .weight = PackedVector(p.weight),
                                    .bias = PackedVector(p.bias),
                                    .out = PackedRows<T>(p.out),
                                    .residual_out = PackedRows<R>(p.residual_out),
                                    .first = 0,
                                    .units = p.rows * groups,
                                    .groups = groups,
                                    .group_size = static_cast<int>(p.group_size),
                                    .one_of_count = 1.0F / static_cast<float>(p.group_size),
                                    .eps = static_cast<float>(p.eps),
                                    .layer = p.kind == NormKind::layer};
    if constexpr (std::is_same_v<T, R>)
      if (p.z)
        return p.norm_before_gate ? launch_fast<T, R, Gate::after_norm>(ctx, plan, problem)
                                  : launch_fast<T, R, Gate::before_norm>(ctx, plan, problem);
    launch_fast<T, R, Gate::none>(ctx, plan, problem);
  });
}

}  // namespace

void cuda(Context& ctx, const Problem& p, const GpuPlan& plan) {
  if (plan.vectors > 0)
    run_fast(ctx, p, plan);
  else
    run_plain(ctx, p);
}

}  // namespace krait::norm_kernels
