#include "krait/ops/activation.h"

#include <gtest/gtest.h>

#include <cmath>

#include "core/each_target.h"
#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/core/random.h"

namespace krait {
namespace {

using testing::on_each_target;

// The vectorised path: on the CPU, or the device's own.
ActivationPath fast() { return testing::on_gpu() ? ActivationPath::automatic : ActivationPath::simd; }

Tensor random_tensor(Rng& rng, const Dims& shape, DType dtype) {
  Tensor t = Tensor::empty(shape);
  for (float& value : t.span<float>()) value = 4.0F * rng.normal();
  return t.to(dtype);
}

void expect_close(const Tensor& got, const Tensor& want, double tolerance) {
  ASSERT_EQ(got.shape(), want.shape());
  const Tensor a = got.to(DType::f64).contiguous();
  const Tensor b = want.to(DType::f64).contiguous();
  for (std::int64_t i = 0; i < a.numel(); ++i)
    ASSERT_NEAR(a.data<double>()[i], b.data<double>()[i], tolerance * (1.0 + std::abs(b.data<double>()[i])))
        << i;
}

double tolerance_of(DType dtype) { return dtype == DType::f32 ? 1e-6 : dtype == DType::f16 ? 1e-3 : 8e-3; }

TEST(Activation, SimdMatchesTheReferenceInEachDtype) {
  on_each_target([] {
    Context ctx;
    Rng rng(1);
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
      for (const Dims& shape :
           {Dims{1}, Dims{7}, Dims{3, 33}, Dims{2, 3, 700}, Dims{5, 1536}, Dims{0, 4}, Dims{4, 0}}) {
        SCOPED_TRACE(concat(dtype, " ", shape));
        const Tensor x = random_tensor(rng, shape, dtype);
        const Tensor g = random_tensor(rng, shape, dtype);
        expect_close(testing::run(ctx, gated_silu, {.x = x, .gate = g, .path = fast()}),
                     testing::run(ctx, gated_silu, {.x = x.to(DType::f64), .gate = g.to(DType::f64)}),
                     tolerance_of(dtype));
        for (const GeluKind kind : {GeluKind::exact, GeluKind::tanh})
          expect_close(testing::run(ctx, gelu, {.x = x, .kind = kind, .path = fast()}),
                       testing::run(ctx, gelu, {.x = x.to(DType::f64), .kind = kind}), tolerance_of(dtype));
      }
  });
}

TEST(Activation, StridesAndInPlace) {
  Context ctx;
  Rng rng(2);
  const Tensor both = random_tensor(rng, {5, 66}, DType::f32);
  const Tensor x = both.slice(1, 0, 33);
  const Tensor g = both.slice(1, 33, 66);
  const Tensor want =
      testing::run(ctx, gated_silu, {.x = x.clone(), .gate = g.clone(), .path = ActivationPath::reference});
  expect_close(testing::run(ctx, gated_silu, {.x = x.transpose(0, 1), .gate = g.transpose(0, 1)}),
               want.transpose(0, 1), 1e-6);
  testing::run(ctx, gated_silu, {.x = x, .gate = g, .out = x});
  expect_close(x, want, 1e-6);
}

TEST(Activation, ExtremesStayFinite) {
  Context ctx;
  const Tensor x = Tensor::from<float>({1.0F, 1.0F, 1.0F, 1.0F});
  const Tensor g = Tensor::from<float>({-200.0F, 200.0F, -1e30F, 1e30F});
  expect_close(testing::run(ctx, gated_silu, {.x = x, .gate = g}),
               Tensor::from<float>({0.0F, 200.0F, 0.0F, 1e30F}), 1e-6);
  for (const GeluKind kind : {GeluKind::exact, GeluKind::tanh})
    expect_close(testing::run(ctx, gelu, {.x = g.slice(0, 0, 2), .kind = kind}),
                 Tensor::from<float>({0.0F, 200.0F}), 1e-6);
}

TEST(Activation, NamesWhatIsWrong) {
  Context ctx;
  const Tensor x = Tensor::zeros({2, 3});
  try {
    gated_silu(ctx, {.x = x, .gate = Tensor::zeros({2, 4})});
    FAIL();
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "[gated_silu] gate has shape (2, 4), expected (2, 3)");
  }
  EXPECT_THROW(gelu(ctx, {.x = Tensor::zeros({2}, DType::i64)}), Error);
  EXPECT_THROW(gelu(ctx, {.x = Tensor::zeros({2}, DType::f64), .path = ActivationPath::simd}), Error);
}

TEST(Activation, ThreadsDoNotChangeBits) {
  Rng rng(3);
  const Tensor x = random_tensor(rng, {300, 129}, DType::f32);
  Context one(ContextOptions{.threads = 1});
  Context three(ContextOptions{.threads = 3});
  const Tensor a = testing::run(one, gelu, {.x = x});
  const Tensor b = testing::run(three, gelu, {.x = x});
  EXPECT_TRUE(std::equal(a.span<float>().begin(), a.span<float>().end(), b.span<float>().begin()));
}

}  // namespace
}  // namespace krait
