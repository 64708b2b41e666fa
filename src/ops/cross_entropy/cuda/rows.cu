// cross_entropy on a GPU: a block has a row of logits and reads it once for the loss. A gradient that is
// wanted with it reads the row again, from shared memory as far as it fits there, else from the second-level
// cache.
#include <algorithm>
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/vectors.cuh"
#include "ops/cross_entropy/kernels.h"

namespace krait::cross_entropy_detail {
namespace {

using cuda::AnyView;
using cuda::IndexView;
using cuda::kPack;
using cuda::Pack;

constexpr int kMaxThreads = 1024;
// Of a row: two rows to a multiprocessor, so that one reads the memory while the other adds up. More of them
// would not stay in the caches until their gradient reads them again.
constexpr int kRowThreads = 512;
template <typename T>
inline constexpr int kVectorOf = static_cast<int>(sizeof(uint4) / sizeof(T));  // elements of 16 bytes

struct RowsOnGpu {
  AnyView<2> logits;
  AnyView<2> dlogits;  // absent: no gradient
  IndexView targets;
  float* losses;  // null: logsumexp is known, and read
  float* logsumexp;
  const std::int64_t* bad;  // targets that are not allowed, where they are counted: any leaves no gradient
  std::int64_t rows;
  std::int64_t vocabulary;
  std::int64_t ignore_index;
  double label_smoothing;
  float scale;
  int held;  // vectors of each thread that shared memory has room for
};

// Logits, T known at compile time and side by side: each thread has 16 bytes of a row at a time. The last
// elements, fewer than that, are those of the first thread. The first `held` vectors of each thread lie in
// shared memory from one walk over a row to the next; as soon as the last walk has read one, that of the next
// row is on its way there.
template <typename T>
class PackedLogits {
 public:
  static constexpr int kCount = kVectorOf<T>;

  __device__ PackedLogits(const AnyView<2>& view, std::int64_t count, int held, uint4* shared)
      : data_(static_cast<const T*>(view.data)),
        stride_(view.stride[0]),
        count_(static_cast<int>(count)),
        held_(held),
        own_(shared + threadIdx.x) {}

  __device__ __forceinline__ void fetch(std::int64_t row) const {
    const uint4* const from = vectors_of(row) + threadIdx.x;
    for (int j = 0; j < held_; ++j) cuda::copy_async(own_ + j * threads(), from + j * threads());
    cuda::commit_copies();
  }

  // body(values, how many, place of the first). After the last walk over a row comes row `next`; -1: none.
  template <typename Body>
  __device__ __forceinline__ void walk(std::int64_t row, bool last_time, std::int64_t next,
                                       const Body& body) const {
    const uint4* const from = vectors_of(row);
    const uint4* const coming = last_time && next >= 0 ? vectors_of(next) : nullptr;
    const auto apply = [&](const uint4& vector, int at) {
      float values[kCount];
      widen(vector, values);
      body(values, std::integral_constant<int, kCount>{}, at * kCount);
    };
    cuda::wait_for_copies<0>();
    const int step = threads();
    int at = static_cast<int>(threadIdx.x);
    uint4* slot = own_;
#pragma unroll 2
    for (int j = 0; j < held_; ++j, at += step, slot += step) {
      apply(*slot, at);
      if (coming != nullptr) cuda::copy_async(slot, coming + at);
    }
    if (last_time) cuda::commit_copies();

    const int vectors = count_ / kCount;
    constexpr int kAtOnce = 4;  // loads on their way
    for (; at + (kAtOnce - 1) * step < vectors; at += kAtOnce * step) {
      uint4 vector[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) vector[i] = from[at + i * step];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) apply(vector[i], at + i * step);
    }
    for (; at < vectors; at += step) apply(from[at], at);
    if (threadIdx.x > 0 || vectors * kCount == count_) return;
    float values[kCount] = {};
    const T* const rest = data_ + row * stride_ + vectors * kCount;
    for (int i = 0; i < kCount - 1; ++i)
      if (vectors * kCount + i < count_) values[i] = cuda::to_float(rest[i]);
    body(values, count_ - vectors * kCount, vectors * kCount);
  }

 private:
  __device__ static __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
  __device__ __forceinline__ const uint4* vectors_of(std::int64_t row) const {
    return reinterpret_cast<const uint4*>(data_ + row * stride_);
  }
  __device__ static __forceinline__ void widen(const uint4& vector, float (&to)[kCount]) {
    if constexpr (kCount == kPack) {
      Pack<T> pack;
      *reinterpret_cast<uint4*>(&pack) = vector;
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[i] = cuda::float_of(pack, i);
    } else {
      to[0] = __uint_as_float(vector.x);
      to[1] = __uint_as_float(vector.y);
      to[2] = __uint_as_float(vector.z);
      to[3] = __uint_as_float(vector.w);
    }
  }

  const T* data_;
  std::int64_t stride_;
  int count_;
  int held_;
  uint4* own_;
};

// Where a gradient goes: the elements that the same thread read.
template <typename T>
class PackedGradient {
 public:
  __device__ PackedGradient(const AnyView<2>& view, std::int64_t row)
      : data_(static_cast<T*>(view.data) + row * view.stride[0]) {}
  template <int kCount>
  __device__ __forceinline__ void store(const float (&values)[kCount], int count, int first) const {
    if (count == kCount) {
      using Word = std::conditional_t<sizeof(T) * kCount == sizeof(uint4), uint4, uint2>;
      static_assert(sizeof(T) * kCount == sizeof(Word));
      alignas(sizeof(Word)) T narrow[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) narrow[i] = cuda::from_float<T>(values[i]);
      *reinterpret_cast<Word*>(data_ + first) = *reinterpret_cast<const Word*>(narrow);
    } else {
      for (int i = 0; i < kCount - 1; ++i)
        if (i < count) data_[first + i] = cuda::from_float<T>(values[i]);
    }
  }

 private:
  T* data_;
};

// Logits and gradients of any dtype and strides, one element at a time.
class AnyLogits {
 public:
  static constexpr int kCount = 1;

  __device__ AnyLogits(const AnyView<2>& view, std::int64_t count, int /*held*/, uint4* /*shared*/)
      : view_(view), count_(count) {}
  __device__ __forceinline__ void fetch(std::int64_t) const {}
  template <typename Body>
  __device__ __forceinline__ void walk(std::int64_t row, bool, std::int64_t, const Body& body) const {
    for (std::int64_t v = threadIdx.x; v < count_; v += blockDim.x) {
      const float values[1] = {view_.load(row, v)};
      body(values, std::integral_constant<int, 1>{}, v);
    }
  }

 private:
  const AnyView<2>& view_;
  std::int64_t count_;
};

class AnyGradient {
 public:
  __device__ AnyGradient(const AnyView<2>& view, std::int64_t row) : view_(view), row_(row) {}
  __device__ __forceinline__ void store(const float (&values)[1], int, std::int64_t first) const {
    view_.store(values[0], row_, first);
  }

 private:
  const AnyView<2>& view_;
  std::int64_t row_;
};

// combine(a, b) over the values of all threads, in every thread, in a fixed order. The block has whole warps.
template <typename Value, typename Combine>
__device__ Value over_block(Value value, Value neutral, const Combine& combine) {
  __shared__ Value scratch[33];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const auto over_warp = [&](Value v) {
    for (int step = 16; step > 0; step /= 2) v = combine(v, __shfl_xor_sync(0xffffffffU, v, step));
    return v;
  };
  value = over_warp(value);
  __syncthreads();  // the last result has been read
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = over_warp(lane < warps ? scratch[lane] : neutral);
    if (lane == 0) scratch[32] = value;
  }
  __syncthreads();
  return scratch[32];
}

__device__ __forceinline__ double add_over_block(double value) {
  return over_block(value, 0.0, [](double a, double b) { return a + b; });
}

// exp, off by 2 + 1.2 |v| ULP at most; 0 below -87.
__device__ __forceinline__ float quick_exp(float v) { return cuda::exp2_fast(v * cuda::kLog2E); }
// What exponentials are taken relative to: the largest logit, or 0 where that is infinite.
__device__ __forceinline__ float shift_of(float largest) { return isinf(largest) ? 0.0F : largest; }
// A sum of exponentials relative to one shift, relative to another that is no smaller.
__device__ __forceinline__ float shifted(float sum, float from, float to) {
  return sum == 0.0F ? 0.0F : sum * quick_exp(from - to);
}

// log sum exp of a row and, where it is asked for, the sum of its logits, in every thread.
template <typename Logits>
__device__ RowSums sums_of(const Logits& rows, std::int64_t row, bool last_time, std::int64_t next,
                           bool wants_logits) {
  float largest = -INFINITY;
  float shift = 0.0F;
  float sum = 0.0F;  // relative to the shift
  float logits = 0.0F;
  rows.walk(row, last_time, next, [&](const auto& values, auto count, auto) {
    float most = largest;
#pragma unroll
    for (int i = 0; i < Logits::kCount; ++i)
      if (i < count) most = fmaxf(most, values[i]);  // which leaves NaN out: the sum has it
    if (most > largest) {
      sum = shifted(sum, shift, shift_of(most));
      largest = most;
      shift = shift_of(most);
    }
#pragma unroll
    for (int i = 0; i < Logits::kCount; ++i)
      if (i < count) sum += quick_exp(values[i] - shift);
    if (!wants_logits) return;
#pragma unroll
    for (int i = 0; i < Logits::kCount; ++i)
      if (i < count) logits += values[i];
  });
  const float most = over_block(largest, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
  const double total = add_over_block(static_cast<double>(shifted(sum, shift, shift_of(most))));
  RowSums sums;
  sums.logsumexp = isinf(most) && !isnan(total) ? static_cast<double>(most)
                                                : static_cast<double>(shift_of(most)) + log(total);
  if (wants_logits) sums.logits = add_over_block(static_cast<double>(logits));
  return sums;
}

template <typename Logits, typename Gradient>
__global__ void __launch_bounds__(kRowThreads, 2) rows_kernel(const RowsOnGpu p) {
  constexpr int kCount = Logits::kCount;
  extern __shared__ uint4 staged[];
  const auto spread = static_cast<float>(p.label_smoothing / static_cast<double>(p.vocabulary));
  const auto hit = static_cast<float>(static_cast<double>(p.scale) * (1.0 - p.label_smoothing));
  const bool none = p.bad != nullptr && *p.bad > 0;
  const Logits logits(p.logits, p.vocabulary, p.held, staged);
  std::int64_t t = blockIdx.x;
  if (t < p.rows) logits.fetch(t);
  for (; t < p.rows; t += gridDim.x) {
    const std::int64_t next = t + gridDim.x < p.rows ? t + gridDim.x : -1;
    const std::int64_t target = p.targets(t);
    const bool ignored = target == p.ignore_index;
    const bool valid = target >= 0 && target < p.vocabulary;
    float logsumexp = 0.0F;
    if (p.losses != nullptr) {
      // Before the gradient may take its place.
      const double at_target = valid ? static_cast<double>(p.logits.load(t, target)) : 0.0;
      const RowSums sums = sums_of(logits, t, p.dlogits.data == nullptr, next, p.label_smoothing != 0.0);
      logsumexp = static_cast<float>(sums.logsumexp);
      if (threadIdx.x == 0) {
        p.logsumexp[t] = logsumexp;
        p.losses[t] = ignored ? 0.0F
                      : valid ? static_cast<float>(loss_of(sums, at_target, p.label_smoothing, p.vocabulary))
                              : NAN;
      }
    } else {
      logsumexp = p.logsumexp[t];
    }
    if (p.dlogits.data == nullptr) continue;
    const Gradient gradient(p.dlogits, t);
    if (ignored || none) {
      logits.walk(t, true, next, [&](const auto&, auto count, auto first) {
        const float zeros[kCount] = {};
        gradient.store(zeros, count, first);
      });
      continue;
    }
    const float scale = valid ? p.scale : NAN;
    const float spread_scaled = spread * scale;
    logits.walk(t, true, next, [&](const auto& values, auto count, auto first) {
      float d[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) d[i] = fmaf(quick_exp(values[i] - logsumexp), scale, -spread_scaled);
      const auto place = static_cast<decltype(first)>(target) - first;
      if (place >= 0 && place < kCount) {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          if (i == place) d[i] -= hit;
      }
      gradient.store(d, count, first);
    });
  }
}

// Rows whose elements lie side by side and begin on the boundary of a vector.
bool in_vectors(const Tensor& t) {
  return !t || (t.stride(1) == 1 && t.stride(0) % kPack == 0 &&
                reinterpret_cast<std::uintptr_t>(t.raw()) % 16 == 0);
}

// Blocks that a multiprocessor holds at once, whose rows are then in its shared memory.
constexpr std::int64_t kBlocksAtOnce = 2;
constexpr std::int64_t kDeclaredShared = 1536;  // beside it, what a block declares and the system takes

void run(Context& ctx, const Tensor& logits, const Tensor& dlogits, RowsOnGpu problem) {
  if (problem.rows == 0) return;
  const auto threads_for = [&](std::int64_t width) {
    return (std::clamp<std::int64_t>((problem.vocabulary + width - 1) / width, 32, kRowThreads) + 31) / 32 *
           32;
  };
  const auto start = [&](auto* kernel, std::int64_t blocks, std::int64_t threads, std::int64_t shared) {
    cuda::launch(ctx, "cross_entropy", kernel,
                 dim3(static_cast<unsigned>(std::min<std::int64_t>(problem.rows, blocks))),
                 dim3(static_cast<unsigned>(threads)), static_cast<std::size_t>(shared), problem);
  };
  const auto packed = [&](auto* kernel, std::int64_t count) {
    const cuda::DeviceLimits& limits = cuda::limits_of(ctx);
    const std::int64_t threads = threads_for(count);
    // Short rows take fewer threads, more of whose blocks a multiprocessor then holds.
    const std::int64_t at_once = kBlocksAtOnce * kRowThreads / threads;
    const std::int64_t room = limits.shared_memory_per_block / at_once - kDeclaredShared;
    const auto vector = threads * static_cast<std::int64_t>(sizeof(uint4));
    // Every thread holds as many.
    problem.held =
        static_cast<int>(std::clamp<std::int64_t>(room / vector, 0, problem.vocabulary / count / threads));
    start(kernel, at_once * limits.multiprocessors, threads, problem.held * vector);
  };
  const DType to = dlogits ? dlogits.dtype() : logits.dtype();
  bool done = false;
  constexpr std::int64_t kMostCount = std::int64_t{1} << 30;  // places in a row are counted in 32 bits
  if (problem.vocabulary < kMostCount && in_vectors(logits) && in_vectors(dlogits) &&
      (to == logits.dtype() || logits.dtype() == DType::f32)) {
    cuda::dispatch_element(logits.dtype(), "[cross_entropy] logits", [&](auto t) {
      using T = decltype(t);
      if (to == logits.dtype()) {
        packed(rows_kernel<PackedLogits<T>, PackedGradient<T>>, kVectorOf<T>);
        done = true;
      } else if (to == DType::bf16) {
        packed(rows_kernel<PackedLogits<float>, PackedGradient<__nv_bfloat16>>, kVectorOf<float>);
        done = true;
      }
    });
  }
  if (!done) start(rows_kernel<AnyLogits, AnyGradient>, std::int64_t{1} << 30, threads_for(1), 0);
}

// Over all targets; the first that is not allowed is found by its place.
struct Totals {
  double sum;
  std::int64_t count;
  std::int64_t bad_place;  // -1: none
  std::int64_t bad_target;
  std::int64_t vocabulary;
  std::int64_t ignore_index;
};

__global__ void __launch_bounds__(kMaxThreads, 1)
    count_bad_kernel(IndexView targets, std::int64_t rows, std::int64_t vocabulary, std::int64_t ignore_index,
                     std::int64_t* bad) {
  long long count = 0;
  for (std::int64_t t = threadIdx.x; t < rows; t += blockDim.x) {
    const std::int64_t target = targets(t);
    if (target != ignore_index && (target < 0 || target >= vocabulary)) ++count;
  }
  count = over_block(count, 0LL, [](long long a, long long b) { return a + b; });
  if (threadIdx.x == 0) *bad = count;
}

__global__ void __launch_bounds__(kMaxThreads, 1)
    totals_kernel(IndexView targets, const float* losses, std::int64_t rows, std::int64_t vocabulary,
                  std::int64_t ignore_index, Totals* totals) {
  double sum = 0.0;
  long long count = 0;
  long long bad = rows;
  for (std::int64_t t = threadIdx.x; t < rows; t += blockDim.x) {
    const std::int64_t target = targets(t);
    if (target == ignore_index) continue;
    if (target < 0 || target >= vocabulary) bad = bad < t ? bad : t;
    sum += static_cast<double>(losses[t]);
    ++count;
  }
  sum = add_over_block(sum);
  count = over_block(count, 0LL, [](long long a, long long b) { return a + b; });
  bad = over_block(bad, static_cast<long long>(rows), [](long long a, long long b) { return a < b ? a : b; });
  if (threadIdx.x == 0)
    *totals = {sum, count, bad == rows ? -1 : bad, bad == rows ? 0 : targets(bad), vocabulary, ignore_index};
}

}  // namespace

void cuda(Context& ctx, const Rows& rows, const Tensor& dlogits, double scale, const Tensor& bad) {
  run(ctx, rows.logits, dlogits,
      {.logits = AnyView<2>(rows.logits),
       .dlogits = AnyView<2>(dlogits),
       .targets = IndexView(rows.targets),
       .losses = rows.losses.data<float>(),
       .logsumexp = rows.logsumexp.data<float>(),
       .bad = bad ? bad.data<std::int64_t>() : nullptr,
       .rows = rows.logits.size(0),
       .vocabulary = rows.logits.size(1),
       .ignore_index = rows.ignore_index,
       .label_smoothing = rows.label_smoothing,
       .scale = static_cast<float>(scale)});
}

void cuda_backward(Context& ctx, const GradientRows& rows) {
  run(ctx, rows.logits, rows.dlogits,
      {.logits = AnyView<2>(rows.logits),
       .dlogits = AnyView<2>(rows.dlogits),
       .targets = IndexView(rows.targets),
       .losses = nullptr,
       .logsumexp = rows.logsumexp.data<float>(),
       .bad = nullptr,
       .rows = rows.logits.size(0),
       .vocabulary = rows.logits.size(1),
       .ignore_index = rows.ignore_index,
       .label_smoothing = rows.label_smoothing,
       .scale = static_cast<float>(rows.scale)});
}

Tensor cuda_count_bad(Context& ctx, const Tensor& targets, std::int64_t vocabulary,
                      std::int64_t ignore_index) {
  Tensor bad = ctx.empty({1}, DType::i64);
  cuda::launch(ctx, "cross_entropy targets", count_bad_kernel, dim3(1), dim3(kMaxThreads), 0,
               IndexView(targets), targets.size(0), vocabulary, ignore_index, bad.data<std::int64_t>());
  return bad;
}

void cuda_add_up(Context& ctx, const Tensor& targets, std::int64_t vocabulary, std::int64_t ignore_index,
                 CrossEntropyResult& result) {
  const std::int64_t rows = targets.size(0);
  if (rows == 0) return;
  result.totals = ctx.empty({static_cast<std::int64_t>(sizeof(Totals))}, DType::u8);
  cuda::launch(ctx, "cross_entropy totals", totals_kernel, dim3(1), dim3(kMaxThreads), 0, IndexView(targets),
               result.losses.data<float>(), rows, vocabulary, ignore_index,
               static_cast<Totals*>(result.totals.raw()));
}

void cuda_read_totals(Context& ctx, CrossEntropyResult& result, const char* op) {
  Totals totals{};
  ctx.copy(result.totals, Tensor::wrap(&totals, result.totals.shape(), DType::u8));
  result.totals = {};
  if (totals.bad_place >= 0)
    fail_target(totals.bad_target, totals.bad_place, totals.vocabulary, totals.ignore_index, op);
  result.count = totals.count;
  result.mean = totals.count == 0 ? 0.0 : totals.sum / static_cast<double>(totals.count);
}

}  // namespace krait::cross_entropy_detail
