#include <type_traits>

#include "ops/norm/cuda/rows.cuh"

namespace krait::norm_kernels {
namespace {

using cuda::kPack;
using cuda::Pack;

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

// One read and one write of every operand: a group of a row stays in registers. Without a gate, x + residual
// or one of them; with one, x alone.
template <typename T, typename R>
struct FastForward {
  PackedRows<T> x;
  PackedRows<R> residual;
  PackedRows<T> z;
  PackedVector weight, bias;
  PackedRows<T> out;
  PackedRows<R> residual_out;
  std::int64_t units;
  std::int64_t groups;
  int group_size;
  float eps;
  bool layer;
  bool norm_before_gate;
};

// Threads that a multiprocessor has registers for.
constexpr int threads_at_once(int vectors) { return vectors == 3 ? 768 : 1024; }
constexpr int kStages = 2;  // rows in shared memory: one in turn, one on its way

template <typename T, typename R, int kVectors, bool kGate>
__global__ void __launch_bounds__(32 * most_warps(kVectors),
                                  threads_at_once(kVectors) / 32 / most_warps(kVectors))
    fast_forward(const FastForward<T, R> p) {
  using Other = std::conditional_t<kGate, T, R>;  // z or residual
  constexpr int kOther = kVectors * kSlots<T>;    // its first slot
  __shared__ float scratch[GroupSums<1>::kFloats];
  extern __shared__ uint4 staged[];
  GroupSums<1> sum_up(scratch);
  const Stages stages(staged, kVectors * (kSlots<T> + kSlots<Other>));
  const float count = static_cast<float>(p.group_size);
  const bool gate_first = kGate && !p.norm_before_gate;
  const int place = first_channel<kVectors>();
  const auto holds = [&](int k) { return place + k * kStep < p.group_size; };
  const auto left = [&](int k) {  // of the group, from the warp's first channel on
    return p.group_size - (place - static_cast<int>(threadIdx.x) % 32 * kPack) - k * kStep;
  };
  const auto row_of = [&](std::int64_t unit) { return p.groups == 1 ? unit : unit / p.groups; };
  const auto channel_of = [&](std::int64_t unit, std::int64_t row) {
    return place + (p.groups == 1 ? 0 : (unit - row * p.groups) * p.group_size);
  };
  const auto copy = [&](std::int64_t unit, int stage) {
    if (unit < p.units) {
      const std::int64_t row = row_of(unit);
      const std::int64_t channel = channel_of(unit, row);
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (kGate || p.x) stages.copy(stage, k * kSlots<T>, p.x.at(row, channel) + k * kStep, left(k));
        if constexpr (kGate)
          stages.copy(stage, kOther + k * kSlots<Other>, p.z.at(row, channel) + k * kStep, left(k));
        else if (p.residual)
          stages.copy(stage, kOther + k * kSlots<Other>, p.residual.at(row, channel) + k * kStep, left(k));
      }
    }
    cuda::commit_copies();
  };

  // Barriers are for blocks of one group alone: those all leave the loop at once.
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.y;
  std::int64_t unit = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  int stage = 0;
  copy(unit, stage);
  for (; unit < p.units; unit += step, stage ^= 1) {
    // What this writes over was read in the turn before, by this warp.
    stages.meet();
    copy(unit + step, stage ^ 1);
    cuda::wait_for_copies<1>();
    stages.meet();
    const std::int64_t row = row_of(unit);
    const std::int64_t channel = channel_of(unit, row);

    float g[kVectors][kPack];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (holds(k)) {
        if (kGate || p.x) {
          const Pack<T> x = stages.read<T>(stage, k * kSlots<T>);
#pragma unroll
          for (int i = 0; i < kPack; ++i) g[k][i] = cuda::float_of(x, i);
        } else {
#pragma unroll
          for (int i = 0; i < kPack; ++i) g[k][i] = 0.0F;
        }
        if (kGate ? gate_first : static_cast<bool>(p.residual)) {
          const Pack<Other> other = stages.read<Other>(stage, kOther + k * kSlots<Other>);
#pragma unroll
          for (int i = 0; i < kPack; ++i) {
            const float value = cuda::float_of(other, i);
            g[k][i] = kGate ? g[k][i] * cuda::quick_silu(value) : g[k][i] + value;
          }
        }
      }
      if constexpr (!kGate)
        if (p.residual_out)
          stages.store(stage, kOther + k * kSlots<R>, p.residual_out.at(row, channel) + k * kStep, left(k),
                       g[k]);
    }
    if (p.layer) {
      float mean[1] = {0.0F};
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        if (!holds(k)) continue;
#pragma unroll
        for (int i = 0; i < kPack; ++i) mean[0] += g[k][i];
      }
      sum_up(mean);
      mean[0] /= count;
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) g[k][i] -= mean[0];
      }
    }
    // Of differences, from the values in registers: nothing cancels where the mean is large.
    float square[1] = {0.0F};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (!holds(k)) continue;
#pragma unroll
      for (int i = 0; i < kPack; ++i) square[0] = fmaf(g[k][i], g[k][i], square[0]);
    }
    sum_up(square);
    const float rstd = 1.0F / sqrtf(square[0] / count + p.eps);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (holds(k)) {
        float weight[kPack];
        p.weight.load(channel + k * kStep, 1.0F, weight);
#pragma unroll
        for (int i = 0; i < kPack; ++i) g[k][i] *= rstd * weight[i];
        if (p.bias) {
          float bias[kPack];
          p.bias.load(channel + k * kStep, 0.0F, bias);
#pragma unroll
          for (int i = 0; i < kPack; ++i) g[k][i] += bias[i];
        }
        if (kGate && !gate_first) {
          const Pack<Other> z = stages.read<Other>(stage, kOther + k * kSlots<Other>);
#pragma unroll
          for (int i = 0; i < kPack; ++i) g[k][i] *= cuda::quick_silu(cuda::float_of(z, i));
        }
      }
      stages.store(stage, k * kSlots<T>, p.out.at(row, channel) + k * kStep, left(k), g[k]);
    }
  }
}

// False where the device has too little shared memory for the plan.
template <typename T, typename R, int kVectors, bool kGate>
bool launch_fast(Context& ctx, const GpuPlan& plan, const FastForward<T, R>& problem) {
  const int threads = plan.warps * plan.groups * 32;
  const auto shared = static_cast<std::size_t>(threads) * kStages * kVectors * 16 *
                      static_cast<std::size_t>(kSlots<T> + (kGate ? kSlots<T> : kSlots<R>));
  if (!shared_memory_suffices(ctx, shared)) return false;
  const std::int64_t blocks = std::min((problem.units + plan.groups - 1) / plan.groups,
                                       resident_blocks(ctx, threads, shared, threads_at_once(kVectors)) *
                                           cuda::limits_of(ctx).multiprocessors);
  cuda::launch(ctx, "norm", fast_forward<T, R, kVectors, kGate>, dim3(static_cast<unsigned>(blocks)),
               dim3(static_cast<unsigned>(plan.warps) * 32, static_cast<unsigned>(plan.groups)), shared,
               problem);
  return true;
}

template <typename T, typename R, bool kGate>
bool launch_fast(Context& ctx, const GpuPlan& plan, const FastForward<T, R>& problem) {
  switch (plan.vectors) {
    case 1: return launch_fast<T, R, 1, kGate>(ctx, plan, problem);
    case 2: return launch_fast<T, R, 2, kGate>(ctx, plan, problem);
    case 3: return launch_fast<T, R, 3, kGate>(ctx, plan, problem);
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

bool run_fast(Context& ctx, const Problem& p, const GpuPlan& plan) {
  const std::int64_t groups = p.channels / p.group_size;
  const std::int64_t units = p.rows * groups;
  bool done = false;
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
                                    .units = units,
                                    .groups = groups,
                                    .group_size = static_cast<int>(p.group_size),
                                    .eps = static_cast<float>(p.eps),
                                    .layer = p.kind == NormKind::layer,
                                    .norm_before_gate = p.norm_before_gate};
    if constexpr (std::is_same_v<T, R>)
      if (p.z) {
        done = launch_fast<T, R, true>(ctx, plan, problem);
        return;
      }
    done = launch_fast<T, R, false>(ctx, plan, problem);
  });
  return done;
}

}  // namespace

void cuda(Context& ctx, const Problem& p, const GpuPlan& plan) {
  if (plan.vectors == 0 || !run_fast(ctx, p, plan)) run_plain(ctx, p);
}

}  // namespace krait::norm_kernels
