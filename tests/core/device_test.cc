// Copies, fills and graphs of a context on a GPU; on the CPU the same calls are those of Tensor.
#include <gtest/gtest.h>

#include "core/on_device.h"
#include "krait/core/context.h"
#include "krait/core/error.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

TEST(Device, Names) {
  EXPECT_EQ(parse_device("cpu"), Device{});
  EXPECT_EQ(parse_device("cuda"), (Device{Device::Kind::cuda, 0}));
  EXPECT_EQ(parse_device("cuda:3"), (Device{Device::Kind::cuda, 3}));
  for (const char* name : {"", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "CUDA", "cuda:99999999999"})
    EXPECT_THROW((void)parse_device(name), Error) << name;
}

TEST(Device, OneThatIsNotThereIsOneLine) {
  try {
    const Context ctx(ContextOptions{.device = {Device::Kind::cuda, 4000}});
    FAIL() << "a context on cuda:4000";
  } catch (const Error& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("cuda:4000"), std::string::npos) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
  }
}

TEST(Device, CopiesConvertBetweenAnyStrides) {
  Context ctx(ContextOptions{.device = testing::test_device()});
  Rng rng(3);
  for (const Dims& shape : {Dims{}, Dims{1}, Dims{7}, Dims{64}, Dims{3, 0, 2}, Dims{5, 1, 6},
                            Dims{2, 3, 4, 5}, Dims{33, 129}, Dims{1000, 48}}) {
    for (const DType from : {DType::f32, DType::bf16, DType::f16}) {
      for (const DType to : {DType::f32, DType::bf16, DType::f16}) {
        for (const bool scatter : {false, true}) {
          SCOPED_TRACE(concat(shape, ' ', from, " to ", to, scatter ? " scattered" : ""));
          const Tensor source =
              testing::random_tensor(rng, shape, from, -3.0, 3.0, scatter ? testing::kScattered : 0);
          const Tensor expected = source.to(to);
          // Host to device with conversion, device to device, device to host into other strides.
          const Tensor there = ctx.empty(shape, to);
          ctx.copy(source, there);
          testing::expect_same_bits(ctx.to_host(there), expected);
          const Tensor raw = ctx.to_device(source);
          testing::expect_same_bits(ctx.to_host(ctx.to(raw, to)), expected);
          const Tensor back = testing::scattered(rng, shape, to);
          ctx.copy(raw, back);
          testing::expect_same_bits(back, expected);
          if (shape.size() >= 2) {
            const Tensor turned = raw.transpose(0, shape.size() - 1);
            testing::expect_same_bits(ctx.to_host(ctx.clone(turned)),
                                      source.transpose(0, shape.size() - 1).clone());
          }
        }
      }
    }
  }
}

TEST(Device, IntegersAndFills) {
  Context ctx(ContextOptions{.device = testing::test_device()});
  const Tensor ids = Tensor::from<std::int64_t>({5, -7, 1 << 20});
  testing::expect_same_bits(ctx.to_host(ctx.to(ctx.to_device(ids), DType::i32)), ids.to(DType::i32));
  const Tensor t = ctx.zeros({4, 6}, DType::bf16);
  ctx.fill(t.slice(1, 2, 5), 1.5);
  const Tensor expected = Tensor::zeros({4, 6}, DType::bf16);
  expected.slice(1, 2, 5).fill(1.5);
  testing::expect_same_bits(ctx.to_host(t), expected);
}

TEST(Device, PoolReusesAndReports) {
  Context ctx(ContextOptions{.device = testing::test_device()});
  void* first = ctx.empty({1000}).raw();
  EXPECT_EQ(ctx.empty({1000}).raw(), first);
  EXPECT_GT(ctx.pool_bytes(), 0U);
  ctx.trim();
  EXPECT_EQ(ctx.pool_bytes(), 0U);
  try {
    (void)ctx.empty({std::int64_t{1} << 45});
    FAIL() << "128 TiB were to be had";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::out_of_memory);
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
  }
}

TEST(Device, TensorsOfTheHostAreRefusedOnAGpuAndTheOtherWayRound) {
  if (!testing::on_gpu()) GTEST_SKIP() << "needs a GPU";
  Context ctx(ContextOptions{.device = testing::test_device()});
  const Tensor t = ctx.zeros({3});
  EXPECT_THROW(t.fill(1.0), Error);
  EXPECT_THROW((void)t.clone(), Error);
  EXPECT_THROW((void)t.span<float>(), Error);
  Context cpu;
  EXPECT_THROW(cpu.fill(t, 1.0), Error);
}

TEST(Device, AGraphRunsAgain) {
  if (!testing::on_gpu()) GTEST_SKIP() << "needs a GPU";
  Context ctx(ContextOptions{.device = testing::test_device()});
  const Tensor in = ctx.to_device(Tensor::from<float>({1.0F, 2.0F, 3.0F}));
  const Tensor out = ctx.zeros({3});
  const auto launch = ctx.record([&] {
    const Tensor between = ctx.to(in, DType::bf16);
    ctx.copy(between, out);
  });
  // Memory taken after the recording is not the graph's.
  const Tensor other = ctx.zeros({3}, DType::bf16);
  launch();
  testing::expect_same_bits(ctx.to_host(out), ctx.to_host(in));
  ctx.fill(in, 8.0);
  launch();
  testing::expect_same_bits(ctx.to_host(out), ctx.to_host(in));
  testing::expect_same_bits(ctx.to_host(other), Tensor::zeros({3}, DType::bf16));
}

}  // namespace
}  // namespace krait
