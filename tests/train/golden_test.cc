// A run of 30 steps against one that an independent implementation made from the same checkpoint and batches.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "core/on_device.h"
#include "io/scratch.h"
#include "krait/io/safetensors.h"
#include "krait/train/train.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::golden_array;

constexpr const char* kGolden = "train-mamba1-tiny";

class GoldenRun : public ::testing::TestWithParam<Recompute> {};

TEST_P(GoldenRun, AgreesWithUpstream) {
  const io::Scratch scratch;
  TrainSettings settings;
  settings.model = testing::golden(kGolden).string();
  settings.data = {(testing::golden(kGolden) / "batches.npy").string()};
  settings.out = (scratch / "out").string();
  settings.lr = 1e-3;
  settings.betas = {0.9, 0.95};
  settings.eps = 1e-8;
  settings.weight_decay = 0.1;
  settings.no_decay = {"A_log", "D"};
  settings.clip = 1.0;
  settings.recompute = GetParam();
  Context ctx(ContextOptions{.device = testing::test_device()});
  train(ctx, settings);

  const Tensor losses = golden_array(kGolden, "losses.npy").to(DType::f64);
  const Tensor norms = golden_array(kGolden, "grad_norms.npy").to(DType::f64);
  std::ifstream metrics(scratch / "out/metrics.jsonl");
  std::int64_t step = 0;
  for (std::string line; std::getline(metrics, line); ++step) {
    ASSERT_LT(step, losses.numel());
    const auto json = nlohmann::json::parse(line);
    const double loss = losses.data<double>()[step];
    const double norm = norms.data<double>()[step];
    EXPECT_NEAR(json["loss"].get<double>(), loss, 1e-4 * loss) << "step " << step;
    EXPECT_NEAR(json["grad_norm"].get<double>(), norm, 1e-3 * norm) << "step " << step;
    EXPECT_EQ(json["step"], step + 1);
  }
  EXPECT_EQ(step, 30);

  const io::TensorMap weights = io::read_safetensors(scratch / "out/model.safetensors");
  EXPECT_EQ(weights.size(), 42U);
  for (const auto& [name, tensor] : weights)
    EXPECT_LT(testing::max_difference(tensor, golden_array(kGolden, "final__" + name + ".npy")), 3e-4)
        << name;
}

INSTANTIATE_TEST_SUITE_P(Recompute, GoldenRun, ::testing::Values(Recompute::none, Recompute::block),
                         [](const auto& instance) {
                           return instance.param == Recompute::none ? "none" : "block";
                         });

}  // namespace
}  // namespace krait
