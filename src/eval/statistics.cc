#include "eval/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "core/parallel.h"
#include "krait/core/error.h"

namespace krait {
namespace {

double sample_deviation(std::span<const double> values) {
  const double center = mean(values);
  double squares = 0.0;
  for (const double value : values) squares += (value - center) * (value - center);
  return std::sqrt(squares / static_cast<double>(values.size() - 1));
}

// Python's random.Random(seed): a Mersenne Twister (Matsumoto and Nishimura 1998) started by init_by_array
// of its authors' reference, which the standard library has no seed sequence for.
class PythonRandom {
 public:
  explicit PythonRandom(std::uint32_t seed) {
    Key key{seed};
    engine_.seed(key);
  }
  // random.random(): 53 bits.
  double uniform() {
    const std::uint32_t high = static_cast<std::uint32_t>(engine_()) >> 5U;
    const std::uint32_t low = static_cast<std::uint32_t>(engine_()) >> 6U;
    return (high * 67108864.0 + low) / 9007199254740992.0;
  }

 private:
  struct Key {
    using result_type = std::uint32_t;
    std::uint32_t seed;

    template <typename Iterator>
    void generate(Iterator begin, Iterator end) const {
      std::vector<std::uint32_t> state(static_cast<std::size_t>(end - begin));
      const std::size_t n = state.size();
      const auto mixed = [&](std::size_t i) { return state[i - 1] ^ (state[i - 1] >> 30U); };
      state[0] = 19650218U;
      for (std::size_t i = 1; i < n; ++i) state[i] = 1812433253U * mixed(i) + static_cast<std::uint32_t>(i);
      std::size_t i = 1;
      const auto advance = [&] {
        if (++i < n) return;
        state[0] = state[n - 1];
        i = 1;
      };
      for (std::size_t k = 0; k < n; ++k) {  // the key has one word, whose index is 0
        state[i] = (state[i] ^ (mixed(i) * 1664525U)) + seed;
        advance();
      }
      for (std::size_t k = 0; k + 1 < n; ++k) {
        state[i] = (state[i] ^ (mixed(i) * 1566083941U)) - static_cast<std::uint32_t>(i);
        advance();
      }
      state[0] = 0x80000000U;
      std::ranges::copy(state, begin);
    }
  };

  std::mt19937 engine_;
};

}  // namespace

double mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double standard_error_of_mean(std::span<const double> values) {
  require(values.size() >= 2, "a standard error of ", values.size(), " values, expected at least 2");
  return sample_deviation(values) / std::sqrt(static_cast<double>(values.size()));
}

double bootstrap_error_of_perplexity(const Context& ctx, std::span<const double> values,
                                     std::int64_t iterations) {
  require(values.size() >= 2, "a standard error of ", values.size(), " values, expected at least 2");
  require(iterations >= 2, "bootstrap iterations are ", iterations, ", expected at least 2");
  const std::int64_t step = std::min<std::int64_t>(iterations, 1000);
  const std::int64_t steps = iterations / step;
  std::vector<double> perplexities(static_cast<std::size_t>(steps * step));
  const auto count = static_cast<double>(values.size());
  parallel_for_dynamic(ctx, steps, [&](std::int64_t i) {
    PythonRandom random(static_cast<std::uint32_t>(i));
    for (std::int64_t k = 0; k < step; ++k) {
      double sum = 0.0;
      for (std::size_t draw = 0; draw < values.size(); ++draw)
        sum += values[static_cast<std::size_t>(random.uniform() * count)];
      perplexities[static_cast<std::size_t>(i * step + k)] = std::exp(-sum / count);
    }
  });
  return sample_deviation(perplexities);
}

}  // namespace krait
