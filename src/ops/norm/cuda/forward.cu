#include <type_traits>

#include "ops/norm/cuda/rows.cuh"

namespace krait::norm_kernels {
namespace {

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

// Channels of a thread in fours, 2 * kVectors of them. What a warp moves by one instruction lies side by side
// in memory: 16-bit types by eights, of which two fours are one load; where there is an f32, all by fours.
template <int kVectors, bool kByFours>
struct Fours {
  static constexpr int kCount = 2 * kVectors;
  static constexpr int kSide = kByFours ? 1 : 2;  // fours that lie side by side

  int first;  // channel of the group

  __device__ __forceinline__ Fours()
      : first(static_cast<int>(threadIdx.x) / 32 * kVectors * kStep +
              static_cast<int>(threadIdx.x) % 32 * 4 * kSide) {}
  // From `first`; a constant in loops that are unrolled.
  static constexpr int offset(int q) { return q / kSide * (128 * kSide) + q % kSide * 4; }
  __device__ __forceinline__ bool holds(int q, int group_size) const {
    return first + offset(q) < group_size;
  }
};

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};

// `from` is where the thread's first channel is; what the group does not hold stays as it is.
template <typename T, int kVectors, bool kByFours>
__device__ __forceinline__ void load_fours(const Fours<kVectors, kByFours>& fours, int group_size,
                                           const T* from, Four<T> (&to)[2 * kVectors]) {
  using Layout = Fours<kVectors, kByFours>;
  struct alignas(sizeof(Four<T>) * Layout::kSide) Side {
    Four<T> v[Layout::kSide];
  };
#pragma unroll
  for (int q = 0; q < Layout::kCount; q += Layout::kSide) {
    if (!fours.holds(q, group_size)) continue;
    const Side side = *reinterpret_cast<const Side*>(from + Layout::offset(q));
#pragma unroll
    for (int i = 0; i < Layout::kSide; ++i) to[q + i] = side.v[i];
  }
}

template <typename T, int kVectors, bool kByFours>
__device__ __forceinline__ void store_fours(const Fours<kVectors, kByFours>& fours, int group_size,
                                            const float (&from)[2 * kVectors][4], T* to) {
  using Layout = Fours<kVectors, kByFours>;
  struct alignas(sizeof(Four<T>) * Layout::kSide) Side {
    Four<T> v[Layout::kSide];
  };
#pragma unroll
  for (int q = 0; q < Layout::kCount; q += Layout::kSide) {
    if (!fours.holds(q, group_size)) continue;
    Side side;
#pragma unroll
    for (int i = 0; i < Layout::kSide; ++i)
#pragma unroll
      for (int c = 0; c < 4; ++c) side.v[i].v[c] = cuda::from_float<T>(from[q + i][c]);
    *reinterpret_cast<Side*>(to + Layout::offset(q)) = side;
  }
}

// Threads that a multiprocessor has registers for.
constexpr int threads_at_once(int vectors) { return vectors == 4 ? 512 : vectors == 3 ? 768 : 1024; }

// A block a group of a row (or a few, each a warp's), all of whose loads are asked for at once. Blocks are
// short and many: while one adds up, others of the multiprocessor load, and memory is read and written in its
// own order. Blocks that stay for many rows, with the next row on its way to shared memory, reach a tenth
// less.
template <typename T, typename R, int kVectors, bool kGate>
__global__ void __launch_bounds__(32 * most_warps(kVectors),
                                  threads_at_once(kVectors) / 32 / most_warps(kVectors))
    fast_forward(const FastForward<T, R> p) {
  using Other = std::conditional_t<kGate, T, R>;  // z or residual
  constexpr bool kByFours = sizeof(T) == 4 || sizeof(Other) == 4;
  using Layout = Fours<kVectors, kByFours>;
  constexpr int kCount = Layout::kCount;
  __shared__ float scratch[GroupSums<1>::kFloats];
  GroupSums<1> sum_up(scratch);
  // Barriers are for blocks of one group alone, which all have one.
  const std::int64_t unit = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (unit >= p.units) return;
  const std::int64_t row = p.groups == 1 ? unit : unit / p.groups;
  const Layout fours;
  const std::int64_t channel = fours.first + (p.groups == 1 ? 0 : (unit - row * p.groups) * p.group_size);
  const bool gate_first = kGate && !p.norm_before_gate;

  Four<T> x[kCount] = {};
  Four<Other> other[kCount] = {};
  if (p.x) load_fours(fours, p.group_size, p.x.at(row, channel), x);
  if constexpr (kGate)
    load_fours(fours, p.group_size, p.z.at(row, channel), other);
  else if (p.residual)
    load_fours(fours, p.group_size, p.residual.at(row, channel), other);

  float g[kCount][4];
#pragma unroll
  for (int q = 0; q < kCount; ++q) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      g[q][c] = cuda::to_float(x[q].v[c]);
      if constexpr (!kGate) g[q][c] += cuda::to_float(other[q].v[c]);
      if (gate_first) g[q][c] *= cuda::quick_silu(cuda::to_float(other[q].v[c]));
    }
  }
  if constexpr (!kGate)
    if (p.residual_out) store_fours(fours, p.group_size, g, p.residual_out.at(row, channel));

  const float count = static_cast<float>(p.group_size);
  if (p.layer) {
    float mean[1] = {0.0F};
#pragma unroll
    for (int q = 0; q < kCount; ++q)
#pragma unroll
      for (int c = 0; c < 4; ++c) mean[0] += g[q][c];
    sum_up(mean);
    mean[0] /= count;
#pragma unroll
    for (int q = 0; q < kCount; ++q)
#pragma unroll
      for (int c = 0; c < 4; ++c) g[q][c] -= fours.holds(q, p.group_size) ? mean[0] : 0.0F;
  }
  // Of differences, from the values in registers: nothing cancels where the mean is large.
  float square[1] = {0.0F};
#pragma unroll
  for (int q = 0; q < kCount; ++q)
#pragma unroll
    for (int c = 0; c < 4; ++c) square[0] = fmaf(g[q][c], g[q][c], square[0]);
  sum_up(square);
  const float rstd = 1.0F / sqrtf(square[0] / count + p.eps);
#pragma unroll
  for (int q = 0; q < kCount; ++q) {
    if (!fours.holds(q, p.group_size)) continue;
    float weight[4];
    float bias[4];
    p.weight.load_four(channel + Layout::offset(q), 1.0F, weight);
    p.bias.load_four(channel + Layout::offset(q), 0.0F, bias);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      g[q][c] = fmaf(g[q][c], rstd * weight[c], bias[c]);
      if (kGate && !gate_first) g[q][c] *= cuda::quick_silu(cuda::to_float(other[q].v[c]));
    }
  }
  store_fours(fours, p.group_size, g, p.out.at(row, channel));
}

template <typename T, typename R, int kVectors, bool kGate>
void launch_fast(const Context& ctx, const GpuPlan& plan, const FastForward<T, R>& problem) {
  const std::int64_t blocks = (problem.units + plan.groups - 1) / plan.groups;
  cuda::launch(ctx, "norm", fast_forward<T, R, kVectors, kGate>, dim3(static_cast<unsigned>(blocks)),
               dim3(static_cast<unsigned>(plan.warps) * 32, static_cast<unsigned>(plan.groups)), 0, problem);
}

template <typename T, typename R, bool kGate>
void launch_fast(const Context& ctx, const GpuPlan& plan, const FastForward<T, R>& problem) {
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

void run_fast(const Context& ctx, const Problem& p, const GpuPlan& plan) {
  const std::int64_t groups = p.channels / p.group_size;
  const std::int64_t units = p.rows * groups;
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
      if (p.z) return launch_fast<T, R, true>(ctx, plan, problem);
    launch_fast<T, R, false>(ctx, plan, problem);
  });
}

}  // namespace

void cuda(Context& ctx, const Problem& p, const GpuPlan& plan) {
  if (plan.vectors == 0)
    run_plain(ctx, p);
  else
    run_fast(ctx, p, plan);
}

}  // namespace krait::norm_kernels
