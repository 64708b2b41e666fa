// Sampling on a GPU: a block a row of logits. The semantics are those of filters.cc; as in sample.cc, tokens
// are ranked by logits, only those near the cut of top_k or top_p are ever sorted, and sums of weights are
// made in one order whatever the timing.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "core/cuda/elements.cuh"
#include "ops/sampling/sampling_internal.h"

namespace krait::sampling {
namespace {

using cuda::AnyView;
using cuda::IndexView;

constexpr int kThreads = 1024;
constexpr int kBlockWarps = kThreads / 32;  // a value of each fits into one warp
static_assert(kBlockWarps == 32);
constexpr int kFew = 2048;  // candidates that are sorted
constexpr unsigned kAll = 0xffffffffU;
constexpr std::uint64_t kEverything = ~std::uint64_t{0};

struct RowsProblem {
  AnyView<2> logits;
  int vocab = 0;
  bool draws = true;  // no argmax
  bool has_penalty = false;
  double penalty = 1.0;
  int top_k = 0;           // 0: off
  double top_p = 0.0;      // 0: off
  double log_min_p = 0.0;  // -infinity: off
  float scale = 1.0F;      // 1 / temperature
  std::uint64_t seed = 0;
  IndexView streams;
  std::int64_t* positions = nullptr;
  std::int64_t position_stride = 1;
  std::uint8_t* seen = nullptr;
  std::int64_t seen_row = 0;
  std::int64_t seen_step = 1;
  std::int64_t* ids = nullptr;
  std::int64_t id_stride = 1;
  AnyView<1> logprobs;
  float* scores = nullptr;  // (B, vocab) where a row does not fit into shared memory
};

// Whose ascending order is that of the logits; -0 equals 0.
__device__ __forceinline__ std::uint32_t rising(float logit) {
  const std::uint32_t bits = __float_as_uint(logit == 0.0F ? 0.0F : logit);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ __forceinline__ float logit_of(std::uint32_t key) {
  return __uint_as_float((key & 0x80000000U) != 0 ? key & 0x7fffffffU : ~key);
}
// Whose ascending order is that of falling logits, then of rising ids.
__device__ __forceinline__ std::uint64_t rank_key(float logit, int id) {
  return static_cast<std::uint64_t>(~rising(logit)) << 32 | static_cast<std::uint32_t>(id);
}

// Number `at` of Rng(seed, stream).
__device__ __forceinline__ std::uint32_t random_number(std::uint64_t seed, std::uint64_t stream,
                                                       std::uint64_t at) {
  const std::uint64_t block = at / 4;
  std::uint32_t c[4] = {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32),
                        static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53U} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57U} * c[2];
    const std::uint32_t next[4] = {
        static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ key0, static_cast<std::uint32_t>(p1),
        static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ key1, static_cast<std::uint32_t>(p0)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  const auto which = static_cast<int>(at % 4);
  return which == 0 ? c[0] : which == 1 ? c[1] : which == 2 ? c[2] : c[3];
}

__device__ __forceinline__ double uniform_double(std::uint64_t seed, std::uint64_t stream, std::uint64_t at) {
  const std::uint64_t high = random_number(seed, stream, at) >> 6;
  const std::uint64_t low = random_number(seed, stream, at + 1) >> 5;
  return static_cast<double>(high << 27 | low) * 0x1p-53;
}

__device__ __forceinline__ double warp_sum(double v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}
__device__ __forceinline__ int warp_sum(int v) { return __reduce_add_sync(kAll, v); }
__device__ __forceinline__ std::uint64_t warp_min(std::uint64_t v) {
  for (int step = 16; step > 0; step /= 2) {
    const std::uint64_t other = __shfl_xor_sync(kAll, v, step);
    v = other < v ? other : v;
  }
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, step));
  return v;
}
__device__ __forceinline__ double warp_prefix(double v, int lane) {  // up to and with this lane
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(kAll, v, step);
    if (lane >= step) v += other;
  }
  return v;
}

// Thresholds of a pass over a row, the highest first; the last is the lowest that is wanted at all.
constexpr int kLevelCount = 8;

struct Shared {
  double totals[kBlockWarps];
  double level_sums[kBlockWarps][kLevelCount];
  int level_counts[kBlockWarps][kLevelCount];
  double sums_at[kLevelCount];
  int counts_at[kLevelCount];
  std::uint64_t best[kBlockWarps];
  float largest[kBlockWarps];
  int counts[kBlockWarps];
  int bad;
  int found;  // candidates
  std::uint64_t cut;
  int id;
};

// A row of scores, and what a thread has of it: warps take consecutive parts, so that sums over parts are
// sums in the order of ids.
struct Row {
  const float* scores;
  int count;
  int begin;  // of this warp's part
  int end;
  int lane;
  int warp;
  float largest;
  float scale;
  float lowest;  // scores below it have no weight

  __device__ __forceinline__ float weight(float score) const {
    // The difference of two finite floats may overflow, and infinity times a scale of 0 is NaN.
    const float below = fmaxf(score - largest, -FLT_MAX);
    return score >= lowest ? expf(below * scale) : 0.0F;
  }
};

// The sum of f(id) over the row; that of each warp's part stays in shared.totals.
template <typename F>
__device__ __forceinline__ double sum_of(const Row& row, Shared& shared, const F& f) {
  double sum = 0.0;
#pragma unroll 4
  for (int i = row.begin + row.lane; i < row.end; i += 32) sum += static_cast<double>(f(i));
  sum = warp_sum(sum);
  __syncthreads();
  if (row.lane == 0) shared.totals[row.warp] = sum;
  __syncthreads();
  return warp_sum(shared.totals[row.lane]);
}

// The first id whose cumulative f exceeds `target`, given the parts' sums in shared.totals; where rounding
// leaves none, the last id of any weight.
template <typename F>
__device__ __forceinline__ int pick(const Row& row, Shared& shared, double target, const F& f) {
  const double part_sum = shared.totals[row.lane];
  const double up_to = warp_prefix(part_sum, row.lane);
  const unsigned parts_beyond = __ballot_sync(kAll, part_sum > 0.0 && up_to > target);
  const unsigned parts_weighing = __ballot_sync(kAll, part_sum > 0.0);
  const int part = parts_beyond != 0 ? __ffs(static_cast<int>(parts_beyond)) - 1
                                     : 31 - __clz(static_cast<int>(parts_weighing | 1U));
  double before = __shfl_sync(kAll, up_to, part > 0 ? part - 1 : 0);
  if (part == 0) before = 0.0;
  if (row.warp == part) {
    int last = row.begin;
    for (int begin = row.begin; begin < row.end; begin += 32) {
      const int i = begin + row.lane;
      const double own = i < row.end ? static_cast<double>(f(i)) : 0.0;
      const double sum = before + warp_prefix(own, row.lane);
      const unsigned weighing = __ballot_sync(kAll, own > 0.0);
      const unsigned beyond = __ballot_sync(kAll, own > 0.0 && sum > target);
      if (beyond != 0) {
        last = begin + __ffs(static_cast<int>(beyond)) - 1;
        break;
      }
      if (weighing != 0) last = begin + 31 - __clz(static_cast<int>(weighing));
      before = __shfl_sync(kAll, sum, 31);
    }
    if (row.lane == 0) shared.id = last;
  }
  __syncthreads();
  return shared.id;
}

// Ascending; `size` is a power of 2.
__device__ __forceinline__ void sort_keys(std::uint64_t* keys, int size) {
  for (int width = 2; width <= size; width *= 2) {
    for (int step = width / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
        const int other = i ^ step;
        if (other <= i) continue;
        const bool up = (i & width) == 0;
        const std::uint64_t a = keys[i];
        const std::uint64_t b = keys[other];
        if ((a > b) == up) {
          keys[i] = b;
          keys[other] = a;
        }
      }
    }
  }
  __syncthreads();
}

// The rank key of the last token of the smallest set of best tokens whose measures reach `wanted`, among
// those whose rank key is at most `limit`. The band of logits in which it lies is narrowed until it holds few
// tokens, which are sorted, or equal ones alone. `spread` is a step of logits in which the top of the row is
// spread.
template <typename Measure>
__device__ __forceinline__ std::uint64_t find_cut(const Row& row, Shared& shared, std::uint64_t* candidates,
                                                  double wanted, std::uint64_t limit, float spread,
                                                  const Measure& measure) {
  constexpr float kSteps[kLevelCount - 1] = {0.5F, 1.0F, 2.0F, 3.5F, 5.5F, 8.0F, 11.0F};
  std::uint32_t low = rising(row.lowest);
  std::uint32_t high = rising(row.largest) + 1;  // exclusive
  double above = 0.0;                            // the measures over the band
  int inside = 0;
  for (bool first = true;; first = false) {
    std::uint32_t levels[kLevelCount];
#pragma unroll
    for (int j = 0; j < kLevelCount; ++j) {
      if (first && j < kLevelCount - 1) {
        const std::uint32_t key = rising(fmaxf(row.largest - kSteps[j] * spread, -FLT_MAX));
        levels[j] = key < low ? low : key;
      } else {
        levels[j] = high - static_cast<std::uint32_t>(std::uint64_t{high - low} * (j + 1) / kLevelCount);
      }
    }
    float sums[kLevelCount] = {};
    int counts[kLevelCount] = {};
    for (int i = row.begin + row.lane; i < row.end; i += 32) {
      const float score = row.scores[i];
      const std::uint32_t key = rising(score);
      if (key < low || key >= high || rank_key(score, i) > limit) continue;
      const float own = measure(score);
#pragma unroll
      for (int j = 0; j < kLevelCount; ++j) {
        sums[j] += key >= levels[j] ? own : 0.0F;
        counts[j] += key >= levels[j] ? 1 : 0;
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kLevelCount; ++j) {
      const double sum = warp_sum(static_cast<double>(sums[j]));
      const int count = warp_sum(counts[j]);
      if (row.lane == 0) {
        shared.level_sums[row.warp][j] = sum;
        shared.level_counts[row.warp][j] = count;
      }
    }
    __syncthreads();
    if (row.warp < kLevelCount) {
      const double sum = warp_sum(shared.level_sums[row.lane][row.warp]);
      const int count = warp_sum(shared.level_counts[row.lane][row.warp]);
      if (row.lane == 0) {
        shared.sums_at[row.warp] = sum;
        shared.counts_at[row.warp] = count;
      }
    }
    __syncthreads();
    double sum_before = 0.0;
    int count_before = 0;
    std::uint32_t next_high = high;
    bool found = false;
#pragma unroll
    for (int j = 0; j < kLevelCount; ++j) {
      if (found) continue;
      const double sum = shared.sums_at[j];
      const int count = shared.counts_at[j];
      if (above + sum >= wanted || j == kLevelCount - 1) {
        found = true;
        low = levels[j];
        inside = count - count_before;
      } else {
        sum_before = sum;
        count_before = count;
        next_high = levels[j];
      }
    }
    high = next_high;
    above += sum_before;
    if (inside <= kFew || high - low <= 1) break;
  }

  if (inside == 0) return static_cast<std::uint64_t>(~high) << 32 | 0xffffffffU;  // all over the band
  if (inside <= kFew) {
    if (threadIdx.x == 0) shared.found = 0;
    int size = 32;
    while (size < inside) size *= 2;
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) candidates[i] = kEverything;
    __syncthreads();
    for (int i = row.begin + row.lane; i < row.end; i += 32) {
      const float score = row.scores[i];
      const std::uint32_t key = rising(score);
      if (key < low || key >= high || rank_key(score, i) > limit) continue;
      candidates[atomicAdd(&shared.found, 1)] = rank_key(score, i);  // in any order: they are sorted
    }
    sort_keys(candidates, size);
    if (row.warp == 0) {
      std::uint64_t cut = candidates[inside - 1];
      for (int begin = 0; begin < inside; begin += 32) {
        const int i = begin + row.lane;
        const std::uint64_t key = candidates[i];  // sizes are multiples of 32
        const double own =
            i < inside ? static_cast<double>(measure(row.scores[static_cast<std::uint32_t>(key)])) : 0.0;
        const double sum = above + warp_prefix(own, row.lane);
        const unsigned reached = __ballot_sync(kAll, i < inside && sum >= wanted);
        if (reached != 0) {
          cut = candidates[begin + __ffs(static_cast<int>(reached)) - 1];
          break;
        }
        above = __shfl_sync(kAll, sum, 31);
      }
      if (row.lane == 0) shared.cut = cut;
    }
    __syncthreads();
    return shared.cut;
  }

  // Equal logits: the first ones by id are kept.
  const double own = static_cast<double>(measure(logit_of(low)));
  const double needed = own > 0.0 ? ceil((wanted - above) / own) : 1.0;
  const int keep = needed < 1.0 ? 1 : needed > inside ? inside : static_cast<int>(needed);
  const auto tied = [&](int i) {
    return rising(row.scores[i]) == low && rank_key(row.scores[i], i) <= limit;
  };
  int count = 0;
  for (int i = row.begin + row.lane; i < row.end; i += 32) count += tied(i) ? 1 : 0;
  count = warp_sum(count);
  if (row.lane == 0) shared.counts[row.warp] = count;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < row.warp; ++w) before += shared.counts[w];
  if (before < keep && before + count >= keep) {
    for (int begin = row.begin; begin < row.end; begin += 32) {
      const int i = begin + row.lane;
      const unsigned ties = __ballot_sync(kAll, i < row.end && tied(i));
      if (before + __popc(ties) < keep) {
        before += __popc(ties);
        continue;
      }
      const bool last =
          (ties >> row.lane & 1U) != 0 && before + __popc(ties & ((1U << row.lane) - 1U)) + 1 == keep;
      if (last) shared.cut = static_cast<std::uint64_t>(~low) << 32 | static_cast<std::uint32_t>(i);
      break;
    }
  }
  __syncthreads();
  return shared.cut;
}

__device__ __forceinline__ int draw(const RowsProblem& p, Row& row, Shared& shared, std::uint64_t* candidates,
                                    double u) {
  std::uint64_t cut = kEverything;
  const bool limited = p.top_k > 0 && p.top_k < p.vocab;
  if (limited) {
    cut = find_cut(row, shared, candidates, static_cast<double>(p.top_k), cut, 1.0F,
                   [](float) { return 1.0F; });
  } else if (p.top_k == 0 && p.log_min_p > -DBL_MAX) {
    // Rounded up: then score >= lowest says exactly what the rule says in f64.
    row.lowest = fmaxf(__double2float_ru(static_cast<double>(row.largest) + p.log_min_p), -FLT_MAX);
  }
  const auto weight_of = [&](int i) {
    const float score = row.scores[i];
    return rank_key(score, i) <= cut ? row.weight(score) : 0.0F;
  };
  double total = sum_of(row, shared, weight_of);
  if (p.top_p > 0.0) {
    const float spread = fminf(1.0F / p.scale, FLT_MAX / 16.0F);
    cut = find_cut(row, shared, candidates, p.top_p * total, cut, spread,
                   [&](float score) { return row.weight(score); });
    total = sum_of(row, shared, weight_of);
  }
  return pick(row, shared, u * total, weight_of);
}

__global__ void __launch_bounds__(kThreads) sample_row(const __grid_constant__ RowsProblem p) {
  extern __shared__ std::uint64_t dynamic[];
  __shared__ Shared shared;
  const std::int64_t b = blockIdx.x;
  auto* const candidates = dynamic;
  float* const scores =
      p.scores != nullptr ? p.scores + b * p.vocab : reinterpret_cast<float*>(dynamic + kFew);
  Row row{};
  row.scores = scores;
  row.count = p.vocab;
  row.lane = static_cast<int>(threadIdx.x) % 32;
  row.warp = static_cast<int>(threadIdx.x) / 32;
  const int part = ((p.vocab + kBlockWarps - 1) / kBlockWarps + 31) / 32 * 32;
  row.begin = min(row.warp * part, p.vocab);
  row.end = min(row.begin + part, p.vocab);
  row.lowest = -FLT_MAX;
  row.scale = p.scale;

  // The scores after the penalty, the best of them, and the largest raw logit.
  std::uint64_t best = kEverything;
  float largest = -INFINITY;
  bool bad = false;
  constexpr int kAhead = 8;  // logits on their way at once
  for (int begin = row.begin + row.lane; begin < row.end; begin += kAhead * 32) {
    float raw[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      raw[j] = begin + j * 32 < row.end ? p.logits.load(b, begin + j * 32) : 0.0F;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = begin + j * 32;
      if (i >= row.end) break;
      bad = bad || !(raw[j] <= FLT_MAX);
      largest = fmaxf(largest, raw[j]);
      float score = raw[j];
      if (p.has_penalty && score >= -FLT_MAX && p.seen[b * p.seen_row + i * p.seen_step] != 0) {
        const auto wide = static_cast<double>(score);
        const double scaled = score < 0.0F ? wide * p.penalty : wide / p.penalty;
        constexpr double kMost = FLT_MAX;
        score = static_cast<float>(fmin(fmax(scaled, -kMost), kMost));
      }
      if (p.draws) scores[i] = score;
      const std::uint64_t key = rank_key(score, i);
      best = key < best ? key : best;
    }
  }
  best = warp_min(best);
  largest = warp_max(largest);
  if (threadIdx.x == 0) shared.bad = 0;
  __syncthreads();
  if (bad) shared.bad = 1;  // one value from whoever comes
  if (row.lane == 0) {
    shared.best[row.warp] = best;
    shared.largest[row.warp] = largest;
  }
  __syncthreads();
  best = warp_min(shared.best[row.lane]);
  largest = warp_max(shared.largest[row.lane]);
  if (shared.bad != 0 || !(largest >= -FLT_MAX)) {
    if (threadIdx.x == 0) {
      p.ids[b * p.id_stride] = -1;
      if (p.logprobs) p.logprobs.store(NAN, b);
    }
    return;
  }
  row.largest = logit_of(~static_cast<std::uint32_t>(best >> 32));

  int id = static_cast<int>(best & 0xffffffffU);
  if (p.draws) {
    const std::int64_t stream = p.streams ? p.streams(b) : b;
    const auto position = static_cast<std::uint64_t>(p.positions[b * p.position_stride]);
    const double u = uniform_double(p.seed, static_cast<std::uint64_t>(stream), position);
    id = draw(p, row, shared, candidates, u);
    if (threadIdx.x == 0) p.positions[b * p.position_stride] = static_cast<std::int64_t>(position + 2);
  }
  if (p.logprobs) {
    const double total = sum_of(row, shared, [&](int i) { return expf(p.logits.load(b, i) - largest); });
    if (threadIdx.x == 0) {
      const double chosen = static_cast<double>(p.logits.load(b, id)) - static_cast<double>(largest);
      p.logprobs.store(static_cast<float>(chosen - log(total)), b);
    }
  }
  if (threadIdx.x == 0) {
    p.ids[b * p.id_stride] = id;
    if (p.seen != nullptr) p.seen[b * p.seen_row + id * p.seen_step] = 1;
  }
}

}  // namespace

void sample_rows_cuda(Context& ctx, const SampleRowsArgs& args) {
  const SamplingOptions& options = args.options;
  const std::int64_t rows = args.logits.size(0);
  RowsProblem problem{.logits = AnyView<2>(args.logits),
                      .vocab = static_cast<int>(args.vocab_size),
                      .draws = !is_argmax(options),
                      .has_penalty = options.repetition_penalty != 1.0,
                      .penalty = options.repetition_penalty,
                      .top_k = static_cast<int>(std::min(options.top_k, args.vocab_size)),
                      .top_p = has_top_p(options.top_p) ? options.top_p : 0.0,
                      .log_min_p = options.min_p > 0.0 ? std::log(options.min_p) : -HUGE_VAL,
                      .scale = static_cast<float>(std::min(1.0 / options.temperature, double{FLT_MAX})),
                      .seed = args.seed,
                      .streams = IndexView(args.streams),
                      .positions = args.positions ? args.positions.data<std::int64_t>() : nullptr,
                      .position_stride = args.positions ? args.positions.stride(0) : 1,
                      .ids = args.ids.data<std::int64_t>(),
                      .id_stride = args.ids.stride(0),
                      .logprobs = AnyView<1>(args.logprobs)};
  if (args.seen) {
    problem.seen = args.seen.data<std::uint8_t>();
    problem.seen_row = args.seen.stride(0);
    problem.seen_step = args.seen.stride(1);
  }
  // Scores are looked at several times: in shared memory where they fit.
  std::size_t shared = 0;
  Tensor scores;
  if (problem.draws) {
    shared = kFew * sizeof(std::uint64_t);
    const std::size_t row_bytes = static_cast<std::size_t>(args.vocab_size) * sizeof(float);
    const auto most = static_cast<std::size_t>(cuda::limits_of(ctx).shared_memory_per_block);
    if (shared + row_bytes + sizeof(Shared) + 1024 <= most) {
      shared += row_bytes;
    } else {
      scores = ctx.empty({rows, args.vocab_size});
      problem.scores = scores.data<float>();
    }
  }
  cuda::launch(ctx, "sample_rows", sample_row, static_cast<unsigned>(rows), kThreads, shared, problem);
}

}  // namespace krait::sampling
