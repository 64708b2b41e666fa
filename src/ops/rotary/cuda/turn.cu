// rotary on a GPU: a block a token and some of its pairs, whose sines serve all heads.
#include <algorithm>

#include "core/cuda/elements.cuh"
#include "ops/rotary/kernels.h"

namespace krait::rotary_kernels {
namespace {

using cuda::AnyView;
using cuda::IndexView;

// Frequencies come by value with the launch: nothing is copied to the device.
constexpr int kPairs = 128;
constexpr int kHeadRows = 2;
struct Frequencies {
  double value[kPairs];
};

struct TurnProblem {
  AnyView<3> x;
  IndexView positions;
  Frequencies frequencies;
  std::int64_t tokens = 0;
  std::int64_t heads = 0;
  std::int64_t all_pairs = 0;
  std::int64_t first_pair = 0;
  int pairs = 0;  // from first_pair on
  bool interleaved = false;
  bool inverse = false;
};

struct Turn {
  float sine;
  float cosine;
};

// The angle in f64, whole quarter turns taken off there: what remains is small and rounded to f32.
__device__ __forceinline__ Turn turn_of(double angle) {
  constexpr double kQuarterHigh = 1.57079632679489655800e+00;
  constexpr double kQuarterLow = 6.12323399573676603587e-17;
  const double quarters = rint(angle * 0.636619772367581343076);
  const double rest = fma(-quarters, kQuarterLow, fma(-quarters, kQuarterHigh, angle));
  float sine = 0.0F;
  float cosine = 0.0F;
  sincospif(static_cast<float>(rest * 0.318309886183790671538), &sine, &cosine);  // in half turns
  switch (static_cast<int>(static_cast<std::int64_t>(quarters) & 3)) {
    case 0: return {sine, cosine};
    case 1: return {cosine, -sine};
    case 2: return {-sine, -cosine};
    default: return {-cosine, sine};
  }
}

__global__ void __launch_bounds__(kPairs* kHeadRows) turn(const __grid_constant__ TurnProblem p) {
  const auto pair = static_cast<int>(threadIdx.x);
  if (pair >= p.pairs) return;
  const std::int64_t i = p.first_pair + pair;
  const std::int64_t first = p.interleaved ? 2 * i : i;
  const std::int64_t second = p.interleaved ? 2 * i + 1 : i + p.all_pairs;
  for (std::int64_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
    const auto position = static_cast<double>(p.positions(t));
    const Turn by = turn_of((p.inverse ? -position : position) * p.frequencies.value[pair]);
    for (std::int64_t h = threadIdx.y; h < p.heads; h += kHeadRows) {
      const float a = p.x.load(t, h, first);
      const float b = p.x.load(t, h, second);
      p.x.store(a * by.cosine - b * by.sine, t, h, first);
      p.x.store(a * by.sine + b * by.cosine, t, h, second);
    }
  }
}

}  // namespace

void turn_cuda(Context& ctx, const Tensor& x, const Tensor& positions, const std::vector<double>& frequencies,
               bool interleaved, bool inverse) {
  TurnProblem problem{.x = AnyView<3>(x),
                      .positions = IndexView(positions),
                      .tokens = x.size(0),
                      .heads = x.size(1),
                      .all_pairs = static_cast<std::int64_t>(frequencies.size()),
                      .interleaved = interleaved,
                      .inverse = inverse};
  for (std::int64_t begin = 0; begin < problem.all_pairs; begin += kPairs) {
    problem.first_pair = begin;
    problem.pairs = static_cast<int>(std::min<std::int64_t>(kPairs, problem.all_pairs - begin));
    std::copy_n(frequencies.begin() + begin, problem.pairs, problem.frequencies.value);
    const auto threads = static_cast<unsigned>((problem.pairs + 31) / 32 * 32);
    cuda::launch(ctx, "rotary", turn, cuda::blocks_for(ctx, problem.tokens, 1, 32), dim3(threads, kHeadRows),
                 0, problem);
  }
}

}  // namespace krait::rotary_kernels
