// cross_entropy on a GPU: a block has a row of logits and reads it once for the loss. A gradient that is
// wanted with it reads the row again while it is in the second-level cache.
#include <algorithm>
#include <type_traits>

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
// would not stay in the second-level cache until their gradient reads them again.
constexpr int kRowThreads = 512;

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
};

// Elements of a row, T known at compile time and side by side: each thread has 8 at a time. The last, fewer
// than 8, are those of the first thread.
template <typename T>
class PackedRow {
 public:
  __device__ PackedRow(const AnyView<2>& view, std::int64_t row)
      : data_(static_cast<T*>(view.data) + row * view.stride[0]) {}

  // body(values, how many, index of the first).
  template <typename Body>
  __device__ __forceinline__ void walk(std::int64_t count, bool last_time, const Body& body) const {
    const std::int64_t whole = count / kPack * kPack;
    const std::int64_t step = std::int64_t{blockDim.x} * kPack;
    const auto load = [&](std::int64_t at) {
      return last_time ? cuda::load_pack(data_ + at) : *reinterpret_cast<const Pack<T>*>(data_ + at);
    };
    // The next vector is on its way while this one is worked on.
    Pack<T> next;
    std::int64_t first = std::int64_t{threadIdx.x} * kPack;
    if (first < whole) next = load(first);
    for (; first < whole; first += step) {
      const Pack<T> pack = next;
      if (first + step < whole) next = load(first + step);
      float values[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) values[i] = cuda::to_float(pack.v[i]);
      body(values, kPack, first);
    }
    if (threadIdx.x > 0 || whole == count) return;
    float values[kPack] = {};
    for (int i = 0; i < kPack - 1; ++i)
      if (whole + i < count) values[i] = cuda::to_float(data_[whole + i]);
    body(values, static_cast<int>(count - whole), whole);
  }
  __device__ __forceinline__ void store(const float (&values)[kPack], int count, std::int64_t first) const {
    if (count == kPack) {
      cuda::store_pack(data_ + first, values);
    } else {
      for (int i = 0; i < kPack - 1; ++i)
        if (i < count) data_[first + i] = cuda::from_float<T>(values[i]);
    }
  }

 private:
  T* data_;
};

// Elements of a row of any dtype and strides, one at a time.
class AnyRow {
 public:
  __device__ AnyRow(const AnyView<2>& view, std::int64_t row) : view_(view), row_(row) {}

  template <typename Body>
  __device__ __forceinline__ void walk(std::int64_t count, bool, const Body& body) const {
    for (std::int64_t v = threadIdx.x; v < count; v += blockDim.x) {
      float values[kPack] = {view_.load(row_, v)};
      body(values, 1, v);
    }
  }
  __device__ __forceinline__ void store(const float (&values)[kPack], int, std::int64_t first) const {
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

// What exponentials are taken relative to: the largest logit, or 0 where that is infinite.
__device__ __forceinline__ float shift_of(float largest) { return isinf(largest) ? 0.0F : largest; }
// A sum of exponentials relative to one shift, relative to another that is no smaller.
__device__ __forceinline__ float shifted(float sum, float from, float to) {
  return sum == 0.0F ? 0.0F : sum * __expf(from - to);
}

// log sum exp of a row and the sum of its logits, in every thread.
template <typename Row>
__device__ RowSums sums_of(const Row& row, std::int64_t vocabulary, bool last_time) {
  float largest = -INFINITY;
  float sum = 0.0F;  // relative to this thread's largest
  float logits = 0.0F;
  row.walk(vocabulary, last_time, [&](const float(&values)[kPack], int count, std::int64_t) {
    float most = largest;
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i < count) most = fmaxf(most, values[i]);  // which leaves NaN out: the sum has it
    if (most > largest) {
      sum = shifted(sum, shift_of(largest), shift_of(most));
      largest = most;
    }
    const float shift = shift_of(largest);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (i >= count) continue;
      sum += __expf(values[i] - shift);
      logits += values[i];
    }
  });
  const float most = over_block(largest, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
  const double total = add_over_block(static_cast<double>(shifted(sum, shift_of(largest), shift_of(most))));
  RowSums sums;
  sums.logsumexp = isinf(most) && !isnan(total) ? static_cast<double>(most)
                                                : static_cast<double>(shift_of(most)) + log(total);
  sums.logits = add_over_block(static_cast<double>(logits));
  return sums;
}

template <typename LogitsRow, typename GradientRow>
__global__ void __launch_bounds__(kRowThreads, 2) rows_kernel(const RowsOnGpu p) {
  const auto spread = static_cast<float>(p.label_smoothing / static_cast<double>(p.vocabulary));
  const bool none = p.bad != nullptr && *p.bad > 0;
  for (std::int64_t t = blockIdx.x; t < p.rows; t += gridDim.x) {
    const LogitsRow row(p.logits, t);
    const std::int64_t target = p.targets(t);
    const bool ignored = target == p.ignore_index;
    const bool valid = target >= 0 && target < p.vocabulary;
    float logsumexp = 0.0F;
    if (p.losses != nullptr) {
      // Before the gradient may take its place.
      const double at_target = valid ? static_cast<double>(p.logits.load(t, target)) : 0.0;
      const RowSums sums = sums_of(row, p.vocabulary, p.dlogits.data == nullptr);
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
    const GradientRow gradient(p.dlogits, t);
    const auto hit = static_cast<float>(static_cast<double>(p.scale) * (1.0 - p.label_smoothing));
    row.walk(p.vocabulary, true, [&](const float(&values)[kPack], int count, std::int64_t first) {
      float d[kPack];
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float share = __expf(values[i] - logsumexp) - spread;
        d[i] = ignored || none ? 0.0F : valid ? share * p.scale - (first + i == target ? hit : 0.0F) : NAN;
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

void run(Context& ctx, const Tensor& logits, const Tensor& dlogits, const RowsOnGpu& problem) {
  if (problem.rows == 0) return;
  const auto start = [&](auto* kernel, std::int64_t width) {
    const std::int64_t threads =
        std::clamp<std::int64_t>((problem.vocabulary + width - 1) / width, 32, kRowThreads);
    cuda::launch(ctx, "cross_entropy", kernel,
                 dim3(static_cast<unsigned>(std::min<std::int64_t>(problem.rows, 1 << 30))),
                 dim3(static_cast<unsigned>((threads + 31) / 32 * 32)), 0, problem);
  };
  const DType to = dlogits ? dlogits.dtype() : logits.dtype();
  bool done = false;
  if (in_vectors(logits) && in_vectors(dlogits) && (to == logits.dtype() || logits.dtype() == DType::f32)) {
    cuda::dispatch_element(logits.dtype(), "[cross_entropy] logits", [&](auto t) {
      using T = decltype(t);
      if (to == logits.dtype()) {
        start(rows_kernel<PackedRow<T>, PackedRow<T>>, kPack);
        done = true;
      } else if (to == DType::bf16) {
        start(rows_kernel<PackedRow<float>, PackedRow<__nv_bfloat16>>, kPack);
        done = true;
      }
    });
  }
  if (!done) start(rows_kernel<AnyRow, AnyRow>, 1);
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
