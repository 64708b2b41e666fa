#include "krait/ops/embedding.h"

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/core/random.h"

namespace krait {
namespace {

using testing::on_gpu;
using testing::run;

const std::vector<DType> kFloats = {DType::f32, DType::f64, DType::bf16, DType::f16};

Tensor random_tensor(const Dims& shape, DType dtype) {
  const Tensor t = Tensor::empty(shape);
  Rng rng(7);
  for (float& value : t.span<float>()) value = rng.normal();
  return t.to(dtype);
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// Element by element through the conversions of core: no rounding is allowed beyond theirs.
void expect_rows(const Tensor& got, const Tensor& weight, const std::vector<std::int64_t>& ids) {
  const Tensor rows = got.contiguous().view({static_cast<std::int64_t>(ids.size()), weight.size(1)});
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Tensor want = weight.select(0, ids[i]).to(got.dtype()).contiguous();
    const Tensor row = rows.select(0, static_cast<std::int64_t>(i));
    EXPECT_EQ(std::memcmp(row.raw(), want.raw(), want.nbytes()), 0) << "row " << i;
  }
}

const std::vector<std::int64_t> kIds = {3, 0, 10, 3, 7, 1};

TEST(Embedding, CopiesRowsOfEveryDtype) {
  Context ctx;
  for (const DType from : kFloats) {
    for (const DType to : kFloats) {
      if (testing::on_gpu() && from != to && (from == DType::f64 || to == DType::f64)) continue;  // the CPU's
      for (const std::int64_t d : {1, 3, 8, 31, 64, 130}) {
        SCOPED_TRACE(concat(from, " to ", to, " d ", d));
        const Tensor weight = random_tensor({11, d}, from);
        const Tensor out =
            run(ctx, embedding, {.ids = Tensor::from(kIds), .weight = weight, .out_dtype = to});
        ASSERT_EQ(out.shape(), (Dims{6, d}));
        ASSERT_EQ(out.dtype(), to);
        expect_rows(out, weight, kIds);
      }
    }
  }
}

TEST(Embedding, EverySimdTarget) {
  if (on_gpu()) GTEST_SKIP() << "targets of the CPU";
  Context ctx;
  const auto targets = hwy::SupportedTargets() & HWY_TARGETS;
  for (auto rest = targets; rest != 0; rest &= rest - 1) {
    SCOPED_TRACE(hwy::TargetName(rest & -rest));
    hwy::SetSupportedTargetsForTest(rest & -rest);
    hwy::GetChosenTarget().Update(rest & -rest);
    for (const DType from : {DType::f32, DType::bf16, DType::f16}) {
      for (const DType to : {DType::f32, DType::bf16, DType::f16}) {
        const Tensor weight = random_tensor({11, 45}, from);
        expect_rows(run(ctx, embedding, {.ids = Tensor::from(kIds), .weight = weight, .out_dtype = to}),
                    weight, kIds);
      }
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

// Every bf16 and f16 survives widening, and every f32 rounds as core rounds it.
TEST(Embedding, ConvertsEveryBitPattern) {
  Context ctx;
  const auto targets = hwy::SupportedTargets() & HWY_TARGETS;
  for (auto rest = targets; rest != 0; rest &= rest - 1) {
    hwy::SetSupportedTargetsForTest(rest & -rest);
    hwy::GetChosenTarget().Update(rest & -rest);
    for (const DType dtype : {DType::bf16, DType::f16}) {
      SCOPED_TRACE(concat(hwy::TargetName(rest & -rest), " ", dtype));
      const Tensor weight = Tensor::empty({1, 65536}, dtype);
      for (int i = 0; i < 65536; ++i)
        static_cast<std::uint16_t*>(weight.raw())[i] = static_cast<std::uint16_t>(i);
      const Tensor zero = Tensor::from(std::vector<std::int64_t>{0});
      const Tensor wide = run(ctx, embedding, {.ids = zero, .weight = weight});
      const Tensor want = weight.to(DType::f32);
      int wrong = 0;
      for (int i = 0; i < 65536; ++i) {
        const float a = want.data<float>()[i];
        const float b = wide.data<float>()[i];
        if (a != a ? b == b : std::memcmp(&a, &b, 4) != 0) ++wrong;
      }
      EXPECT_EQ(wrong, 0) << "widened";

      // Values on, just above and just below the middle between neighbours.
      Tensor between = Tensor::empty({1, 3 * 65536});
      for (int i = 0; i < 65536; ++i) {
        for (int j = 0; j < 3; ++j) {
          const auto bits = (static_cast<std::uint32_t>(i) << 16) + 0x7fffU + static_cast<std::uint32_t>(j);
          std::memcpy(between.data<float>() + 3 * i + j, &bits, 4);
        }
      }
      const Tensor narrow = run(ctx, embedding, {.ids = zero, .weight = between, .out_dtype = dtype});
      const Tensor rounded = between.to(dtype);
      wrong = 0;
      for (int i = 0; i < 3 * 65536; ++i) {
        const float value = between.data<float>()[i];
        if (value == value &&
            static_cast<std::uint16_t*>(narrow.raw())[i] != static_cast<std::uint16_t*>(rounded.raw())[i])
          ++wrong;
      }
      EXPECT_EQ(wrong, 0) << "rounded";
    }
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

TEST(Embedding, TakesAnyShapeAndStrides) {
  Context ctx;
  const Tensor weight = random_tensor({11, 20}, DType::bf16);
  const Tensor ids = Tensor::from(std::vector<std::int32_t>{3, 0, 10, 3, 7, 1}, {2, 3});
  expect_rows(run(ctx, embedding, {.ids = ids, .weight = weight}), weight, kIds);
  expect_rows(run(ctx, embedding, {.ids = ids.transpose(0, 1), .weight = weight}), weight,
              {3, 3, 0, 7, 10, 1});
  const Tensor turned = weight.transpose(0, 1).clone().transpose(0, 1);
  expect_rows(run(ctx, embedding, {.ids = ids, .weight = turned}), weight, kIds);
  const Tensor part = weight.slice(1, 3, 16);
  expect_rows(run(ctx, embedding, {.ids = ids, .weight = part}), part, kIds);

  const Tensor out = Tensor::empty({2, 20, 3}).transpose(1, 2);
  EXPECT_EQ(run(ctx, embedding, {.ids = ids, .weight = weight, .out = out}).raw(), out.raw());
  expect_rows(out, weight, kIds);
}

TEST(Embedding, EmptyAndSingle) {
  Context ctx;
  const Tensor weight = random_tensor({11, 20}, DType::f32);
  EXPECT_EQ(run(ctx, embedding, {.ids = Tensor::zeros({2, 0}, DType::i64), .weight = weight}).shape(),
            (Dims{2, 0, 20}));
  EXPECT_EQ(
      run(ctx, embedding, {.ids = Tensor::zeros({2}, DType::i64), .weight = Tensor::zeros({3, 0})}).shape(),
      (Dims{2, 0}));
  EXPECT_EQ(run(ctx, embedding, {.ids = Tensor::zeros({}, DType::i64), .weight = weight}).shape(),
            (Dims{20}));
}

TEST(Embedding, ReferenceIsTheSame) {
  Context ctx(ContextOptions{.reference = true});
  const Tensor weight = random_tensor({11, 20}, DType::f16);
  expect_rows(run(ctx, embedding, {.ids = Tensor::from(kIds), .weight = weight}), weight, kIds);
  EXPECT_EQ(ctx.backend(), "embedding: reference");
}

// What the host cannot look at without waiting for the GPU gives zeros there.
TEST(Embedding, IdsOutsideAreHarmlessOnAGpu) {
  if (!on_gpu()) GTEST_SKIP() << "an error on the CPU";
  Context ctx;
  const Tensor weight = random_tensor({5, 8}, DType::f32);
  const Tensor out =
      run(ctx, embedding, {.ids = Tensor::from(std::vector<std::int64_t>{5, 2, -1}), .weight = weight});
  for (const std::int64_t row : {0, 2})
    for (std::int64_t c = 0; c < 8; ++c) EXPECT_EQ(out.data<float>()[row * 8 + c], 0.0F);
  expect_rows(out.slice(0, 1, 2), weight, {2});
}

TEST(Embedding, SaysWhatIsWrong) {
  Context ctx;
  const Tensor weight = Tensor::zeros({5, 2});
  const auto text = [&](const EmbeddingArgs& args) {
    return message_of([&] { (void)embedding(ctx, args); });
  };
  EXPECT_EQ(text({.ids = Tensor::from(std::vector<std::int64_t>{0, 4, 5}), .weight = weight}),
            "[embedding] id 5 at position 2 is outside [0, 5)");
  EXPECT_EQ(text({.ids = Tensor::from(std::vector<std::int32_t>{-1}), .weight = weight}),
            "[embedding] id -1 at position 0 is outside [0, 5)");
  EXPECT_NE(text({.ids = Tensor::zeros({1}), .weight = weight}), "");
  EXPECT_NE(text({.ids = Tensor::zeros({1}, DType::i64), .weight = Tensor::zeros({5})}), "");
  EXPECT_NE(text({.ids = Tensor::zeros({1}, DType::i64), .weight = Tensor::zeros({5, 2}, DType::i8)}), "");
  EXPECT_NE(text({.ids = Tensor::zeros({1}, DType::i64), .weight = weight, .out_dtype = DType::i32}), "");
  EXPECT_NE(text({.weight = weight}), "");
  EXPECT_NE(text({.ids = Tensor::zeros({1}, DType::i64)}), "");
  EXPECT_EQ(text({.ids = Tensor::zeros({1}, DType::i64), .weight = weight, .out = Tensor::zeros({2, 2})}),
            "[embedding] out has shape (2, 2), expected (1, 2)");
}

}  // namespace
}  // namespace krait
