#include "eval/statistics.h"

#include <gtest/gtest.h>

#include <vector>

#include "io/scratch.h"

namespace krait {
namespace {

TEST(Statistics, MeanAndItsError) {
  const std::vector<double> values{1, 0, 0, 1, 1};
  EXPECT_DOUBLE_EQ(mean(values), 0.6);
  EXPECT_DOUBLE_EQ(standard_error_of_mean(values), 0.2449489742783178);  // sqrt(0.3 / 5)
  EXPECT_MESSAGE(standard_error_of_mean(std::vector<double>{1.0}), "1 values, expected at least 2");
}

// Python: [exp(-sum(r.choices(values, k=5)) / 5) for i in range(n // step) for r in [Random(i)] for _ in
// range(step)], and the sample deviation of that.
TEST(Statistics, BootstrapDrawsAsPythonDoes) {
  const std::vector<double> values{-1.5, -0.25, -3.0, -2.0, -0.5};
  Context ctx;
  EXPECT_NEAR(bootstrap_error_of_perplexity(ctx, values, 3), 2.511212263267339, 1e-12);
  EXPECT_NEAR(bootstrap_error_of_perplexity(ctx, values, 2500), 2.283231858562565, 1e-12);
  Context one(ContextOptions{.threads = 1});
  EXPECT_EQ(bootstrap_error_of_perplexity(one, values, 2500),
            bootstrap_error_of_perplexity(ctx, values, 2500));
  EXPECT_MESSAGE(bootstrap_error_of_perplexity(ctx, values, 1), "iterations are 1, expected at least 2");
}

}  // namespace
}  // namespace krait
