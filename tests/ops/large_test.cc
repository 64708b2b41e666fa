// Sizes beyond 32-bit and 16-bit arithmetic: tensors of more than 2^31 elements (on a GPU with the memory for
// them) and batches of more than 65,535 rows. Rows of a batch, and packed sequences, do not know of one
// another: a few different ones, repeated, have the same results, repeated.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/ops/activation.h"
#include "krait/ops/causal_conv1d.h"
#include "krait/ops/cross_entropy.h"
#include "krait/ops/dropout.h"
#include "krait/ops/embedding.h"
#include "krait/ops/linear.h"
#include "krait/ops/norm.h"
#include "krait/ops/rotary.h"
#include "krait/ops/sampling.h"
#include "krait/ops/selective_scan.h"
#include "krait/ops/ssd.h"
#include "krait/ops/state_update.h"
#include "ops/random_tensors.h"

namespace krait {
namespace {

using testing::random_tensor;

// No power of two is a multiple of it: an index that lost its upper bits names another row.
constexpr std::int64_t kPeriod = 7;

struct Problem {
  std::vector<Tensor> rows;    // (kPeriod, ...) each
  std::vector<Tensor> shared;  // what all rows use
};
struct Results {
  std::vector<Tensor> rows;  // (rows, ...) each
  std::vector<Tensor> sums;  // over rows
  double tolerance = 0.0;    // at least, of rows
};
using Operators =
    std::function<Results(Context&, const std::vector<Tensor>& rows, const std::vector<Tensor>& shared)>;

Tensor repeated(Context& ctx, const Tensor& few, std::int64_t count) {
  Dims shape = few.shape();
  shape[0] = count;
  const Tensor many = ctx.empty(shape, few.dtype());
  ctx.copy(few, many.slice(0, 0, kPeriod));
  for (std::int64_t done = kPeriod; done < count;) {
    const std::int64_t next = std::min(done, count - done);
    ctx.copy(many.slice(0, 0, next), many.slice(0, done, done + next));
    done += next;
  }
  return many;
}

// So that results which were never written differ from those that were.
void spoil(Context& ctx, const Results& few, std::int64_t repeats) {
  std::vector<Tensor> held;
  for (const Tensor& t : few.rows) {
    held.push_back(ctx.empty({t.numel() * repeats}, t.dtype()));
    ctx.fill(held.back(), t.dtype() == DType::i64 ? -7.0 : std::numeric_limits<double>::quiet_NaN());
  }
}

double tolerance_of(DType dtype) { return std::max(1e-4, 4 * testing::rounding_of(dtype)); }

void expect_repeats(Context& ctx, const Problem& problem, std::int64_t repeats, const Operators& run) {
  const auto moved = [&](const std::vector<Tensor>& tensors, std::int64_t times) {
    std::vector<Tensor> to;
    for (const Tensor& t : tensors)
      to.push_back(times == 0 ? ctx.clone(ctx.to_device(t))
                              : repeated(ctx, ctx.to_device(t), times * kPeriod));
    return to;
  };
  const std::vector<Tensor> shared = moved(problem.shared, 0);
  const Results few = run(ctx, moved(problem.rows, 0), shared);
  spoil(ctx, few, repeats);
  const Results many = run(ctx, moved(problem.rows, repeats), shared);
  for (std::size_t i = 0; i < few.rows.size(); ++i) {
    const Tensor expected = ctx.to_host(few.rows[i]);
    const std::int64_t row = std::max<std::int64_t>(expected.numel() / kPeriod, 1);
    ASSERT_EQ(many.rows[i].size(0), repeats * kPeriod);
    // The first and the last rows, and those where counts of elements and rows pass a power of two.
    std::vector<std::int64_t> looked_at = {0, repeats - 1};
    for (const std::int64_t power : {std::int64_t{1} << 16, std::int64_t{1} << 31, std::int64_t{1} << 32})
      for (const std::int64_t elements : {std::int64_t{1}, row})
        if (const std::int64_t block = power / elements / kPeriod; block < repeats) {
          looked_at.push_back(block);
          looked_at.push_back(std::min(block + 1, repeats - 1));
        }
    for (const std::int64_t block : looked_at) {
      const Tensor found = ctx.to_host(many.rows[i].slice(0, block * kPeriod, (block + 1) * kPeriod));
      const double tolerance = std::max(tolerance_of(found.dtype()), few.tolerance);
      testing::expect_close(found, expected, tolerance, tolerance,
                            "result " + std::to_string(i) + ", rows from " + std::to_string(block * kPeriod));
    }
  }
  for (std::size_t i = 0; i < few.sums.size(); ++i) {
    const Tensor expected = ctx.to_host(few.sums[i]).to(DType::f64);
    auto* values = static_cast<double*>(expected.raw());
    for (std::int64_t k = 0; k < expected.numel(); ++k) values[k] *= static_cast<double>(repeats);
    // Sums over so many equal terms round often.
    testing::expect_close(ctx.to_host(many.sums[i]), expected, 1e-2, 1e-2, "sum " + std::to_string(i));
  }
}

class Large : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (elements() && !testing::on_gpu()) GTEST_SKIP() << "only where a GPU has the memory";
  }
  void TearDown() override { ctx().trim(); }
  [[nodiscard]] bool elements() const { return GetParam(); }
  [[nodiscard]] DType dtype() const { return elements() ? DType::bf16 : DType::f32; }
  // A size for many rows, or for many elements.
  [[nodiscard]] std::int64_t pick(std::int64_t rows, std::int64_t elements) const {
    return GetParam() ? elements : rows;
  }
  Context& ctx() { return testing::on_gpu() ? testing::gpu_context() : cpu_; }
  Tensor random(const Dims& shape, double low = -1.0, double high = 1.0) {
    return random_tensor(rng_, shape, dtype(), low, high);
  }
  Tensor random_f32(const Dims& shape, double low = -1.0, double high = 1.0) {
    return random_tensor(rng_, shape, DType::f32, low, high);
  }
  // How often the rows are repeated: until there are 70,000 of them, or until the first has 2^31 elements and
  // more.
  void check(const Problem& problem, const Operators& run) {
    const std::int64_t wanted =
        elements() ? (std::int64_t{1} << 31) + (std::int64_t{1} << 24) : 70000 * kPeriod;
    const std::int64_t each = elements() ? problem.rows[0].numel() : kPeriod * kPeriod;
    try {
      expect_repeats(ctx(), problem, (wanted + each - 1) / each, run);
    } catch (const Error& e) {
      if (!elements() || e.kind() != ErrorKind::out_of_memory) throw;
      GTEST_SKIP() << e.what();
    }
  }

 private:
  Context cpu_;
  Rng rng_{11};
};

INSTANTIATE_TEST_SUITE_P(Of, Large, ::testing::Values(false, true),
                         [](const auto& of) { return of.param ? "Elements" : "Rows"; });

// (B, L, D) seen as (B, D, L), or all rows as packed sequences: (1, D, B L).
struct AsRows {
  bool packed = false;
  std::int64_t rows = 0;

  [[nodiscard]] Tensor by_channel(const Tensor& t) const {
    return (packed ? t.view({1, t.size(0) * t.size(1), t.size(2)}) : t).transpose(1, 2);
  }
  [[nodiscard]] Tensor flat(const Tensor& t) const {
    if (!packed) return t;
    Dims shape = t.shape();
    shape[1] *= shape[0];
    shape[0] = 1;
    return t.view(shape);
  }
  [[nodiscard]] Tensor bounds(std::int64_t length) const {
    if (!packed) return {};
    std::vector<std::int64_t> at;
    for (std::int64_t i = 0; i <= rows; ++i) at.push_back(i * length);
    return Tensor::from(at);
  }
};

TEST_P(Large, CausalConv1d) {
  const std::int64_t length = pick(3, 300);
  const std::int64_t channels = pick(8, 1024);
  for (const bool packed : {false, true})
    check({.rows = {random({kPeriod, length, channels}), random({kPeriod, length, channels})},
           .shared = {random_f32({channels, 4}), random_f32({channels})}},
          [&](Context& c, const auto& rows, const auto& shared) {
            const AsRows as{packed, rows[0].size(0)};
            const Tensor out = c.empty(rows[0].shape(), dtype());
            const Tensor dx = c.empty(rows[0].shape(), dtype());
            const Tensor dweight = c.zeros(shared[0].shape());
            const Tensor dbias = c.zeros(shared[1].shape());
            CausalConv1dResult result = causal_conv1d(c, {.x = as.by_channel(rows[0]),
                                                          .weight = shared[0],
                                                          .bias = shared[1],
                                                          .cu_seqlens = as.bounds(length),
                                                          .activation = Activation::silu,
                                                          .return_final_states = true,
                                                          .out = as.by_channel(out)});
            causal_conv1d_backward(c, {.x = as.by_channel(rows[0]),
                                       .weight = shared[0],
                                       .bias = shared[1],
                                       .cu_seqlens = as.bounds(length),
                                       .activation = Activation::silu,
                                       .dout = as.by_channel(rows[1]),
                                       .dx = as.by_channel(dx),
                                       .dweight = dweight,
                                       .dbias = dbias});
            return Results{{out, result.final_states, dx}, {dweight, dbias}};
          });
}

TEST_P(Large, CausalConv1dAlongTime) {
  const std::int64_t length = pick(3, 300);
  const std::int64_t channels = pick(8, 1024);
  check({.rows = {random({kPeriod, channels, length}), random({kPeriod, channels, length})},
         .shared = {random_f32({channels, 4})}},
        [&](Context& c, const auto& rows, const auto& shared) {
          const Tensor dx = c.empty(rows[0].shape(), dtype());
          CausalConv1dResult result = causal_conv1d(c, {.x = rows[0], .weight = shared[0]});
          causal_conv1d_backward(c, {.x = rows[0], .weight = shared[0], .dout = rows[1], .dx = dx});
          return Results{{result.out, dx}, {}};
        });
}

TEST_P(Large, SelectiveScan) {
  const std::int64_t length = pick(3, 300);
  const std::int64_t channels = pick(8, 1024);
  constexpr std::int64_t kStates = 16;
  for (const bool packed : {false, true})
    check({.rows = {random({kPeriod, length, channels}), random({kPeriod, length, channels}, 0.0, 0.5),
                    random({kPeriod, length, channels}), random({kPeriod, length, kStates}),
                    random({kPeriod, length, kStates}), random({kPeriod, length, channels})},
           .shared = {random_f32({channels, kStates}, -1.0, -0.1), random_f32({channels})}},
          [&](Context& c, const auto& rows, const auto& shared) {
            const AsRows as{packed, rows[0].size(0)};
            const Tensor out = c.empty(rows[0].shape(), dtype());
            SelectiveScanBackwardArgs backward{.forward = {.u = as.by_channel(rows[0]),
                                                           .delta = as.by_channel(rows[1]),
                                                           .A = shared[0],
                                                           .B = as.by_channel(rows[3]),
                                                           .C = as.by_channel(rows[4]),
                                                           .D = shared[1],
                                                           .z = as.by_channel(rows[2]),
                                                           .cu_seqlens = as.bounds(length),
                                                           .return_last_state = true,
                                                           .out = as.by_channel(out)},
                                               .dout = as.by_channel(rows[5])};
            const SelectiveScanResult result = selective_scan(c, backward.forward);
            Results results{{out, result.last_state}, {}};
            const auto gradient = [&](const Tensor& of, bool summed) {
              (summed ? results.sums : results.rows)
                  .push_back(summed ? c.zeros(of.shape()) : c.empty(of.shape(), of.dtype()));
              return summed ? results.sums.back() : as.by_channel(results.rows.back());
            };
            backward.du = gradient(rows[0], false);
            backward.ddelta = gradient(rows[1], false);
            backward.dz = gradient(rows[2], false);
            backward.dB = gradient(rows[3], false);
            backward.dC = gradient(rows[4], false);
            backward.dA = gradient(shared[0], true);
            backward.dD = gradient(shared[1], true);
            selective_scan_backward(c, backward);
            return results;
          });
}

TEST_P(Large, Ssd) {
  const std::int64_t length = pick(3, 512);
  const std::int64_t heads = pick(2, 8);
  const std::int64_t headdim = pick(4, 64);
  const std::int64_t states = pick(8, 128);
  for (const bool packed : {false, true})
    check({.rows = {random({kPeriod, length, heads, headdim}), random({kPeriod, length, heads}, -1.0, 0.5),
                    random({kPeriod, length, 1, states}), random({kPeriod, length, 1, states}),
                    random({kPeriod, length, heads, headdim})},
           .shared = {random_f32({heads}, -1.0, -0.1), random_f32({heads})}},
          [&](Context& c, const auto& rows, const auto& shared) {
            const AsRows as{packed, rows[0].size(0)};
            const Tensor out = c.empty(rows[0].shape(), dtype());
            SsdBackwardArgs backward{.forward = {.x = as.flat(rows[0]),
                                                 .dt = as.flat(rows[1]),
                                                 .A = shared[0],
                                                 .B = as.flat(rows[2]),
                                                 .C = as.flat(rows[3]),
                                                 .D = shared[1],
                                                 .cu_seqlens = as.bounds(length),
                                                 .dt_softplus = true,
                                                 .return_final_states = true,
                                                 .out = as.flat(out)},
                                     .dout = as.flat(rows[4])};
            const SsdResult result = ssd(c, backward.forward);
            // States are sums in f32 of operands that may have 16 bits, rounded with the parts that rows are
            // cut into, which are others where there are many.
            Results results{{out, result.final_states}, {}, tolerance_of(dtype())};
            const auto gradient = [&](const Tensor& of) {
              results.rows.push_back(c.empty(of.shape(), of.dtype()));
              return as.flat(results.rows.back());
            };
            backward.dx = gradient(rows[0]);
            backward.ddt = gradient(rows[1]);
            backward.dB = gradient(rows[2]);
            backward.dC = gradient(rows[3]);
            backward.dA = c.zeros({heads});
            backward.dD = c.zeros({heads});
            ssd_backward(c, backward);
            results.sums = {backward.dA, backward.dD};
            return results;
          });
}

TEST_P(Large, StateUpdate) {
  const std::int64_t heads = pick(2, 32);
  const std::int64_t headdim = pick(4, 64);
  const std::int64_t states = pick(8, 128);
  check({.rows = {random({kPeriod, heads, headdim, states}), random({kPeriod, heads, headdim}),
                  random({kPeriod, heads}), random({kPeriod, 1, states}), random({kPeriod, 1, states})},
         .shared = {random_f32({heads}, -1.0, -0.1)}},
        [&](Context& c, const auto& rows, const auto& shared) {
          const Tensor out = state_update(c, {.state = rows[0],
                                              .x = rows[1],
                                              .dt = rows[2],
                                              .A = shared[0],
                                              .B = rows[3],
                                              .C = rows[4],
                                              .dt_softplus = true});
          return Results{{out, rows[0]}, {}};
        });
}

TEST_P(Large, CausalConv1dUpdate) {
  const std::int64_t channels = pick(8, 4096);
  check({.rows = {random({kPeriod, channels, 3}), random({kPeriod, channels})},
         .shared = {random_f32({channels, 4})}},
        [&](Context& c, const auto& rows, const auto& shared) {
          const Tensor out =
              causal_conv1d_update(c, {.x = rows[1], .conv_state = rows[0], .weight = shared[0]});
          return Results{{out, rows[0]}, {}};
        });
}

TEST_P(Large, GatedNorm) {
  const std::int64_t channels = pick(8, 2048);
  for (const NormKind kind : {NormKind::rms, NormKind::layer})
    check({.rows = {random({kPeriod, 3, channels}), random({kPeriod, 3, channels}),
                    random({kPeriod, 3, channels})},
           .shared = {random_f32({channels})}},
          [&](Context& c, const auto& rows, const auto& shared) {
            const Tensor dx = c.empty(rows[0].shape(), dtype());
            const Tensor dz = c.empty(rows[0].shape(), dtype());
            const Tensor dweight = c.zeros({channels});
            const NormResult result = norm(c, kind, {.x = rows[0], .weight = shared[0], .z = rows[1]});
            norm_backward(c, kind,
                          {.x = rows[0],
                           .weight = shared[0],
                           .z = rows[1],
                           .dout = rows[2],
                           .dx = dx,
                           .dz = dz,
                           .dweight = dweight});
            return Results{{result.out, dx, dz}, {dweight}};
          });
}

TEST_P(Large, Linear) {
  const std::int64_t in = pick(8, 512);
  const std::int64_t out = pick(16, 8192);
  check({.rows = {random({kPeriod, out}), random({kPeriod, in})}, .shared = {random({out, in})}},
        [&](Context& c, const auto& rows, const auto& shared) {
          const Tensor dx = c.empty(rows[1].shape(), dtype());
          const Tensor dweight = c.zeros({out, in});
          const Tensor y = linear(c, {.x = rows[1], .weight = shared[0]});
          linear_backward(c,
                          {.x = rows[1], .weight = shared[0], .dout = rows[0], .dx = dx, .dweight = dweight});
          return Results{{y, dx}, {dweight}};
        });
}

// Rows of the weight, of which there are many.
TEST_P(Large, LinearOfManyOutputs) {
  const std::int64_t in = pick(8, 4096);
  for (const std::int64_t tokens : {1, 3, 40})
    check({.rows = {random({kPeriod, in})}, .shared = {random({tokens, in})}},
          [&](Context& c, const auto& rows, const auto& shared) {
            const Tensor y = linear(c, {.x = shared[0], .weight = rows[0]});
            return Results{{y.transpose(0, 1)}, {}};
          });
}

TEST_P(Large, Embedding) {
  const std::int64_t width = pick(8, 4096);
  check({.rows = {random({kPeriod, width}), random({kPeriod, width})}, .shared = {}},
        [&](Context& c, const auto& rows, const auto& /*shared*/) {
          std::vector<std::int64_t> ids;
          for (std::int64_t i = 0; i < rows[0].size(0); ++i) ids.push_back(i);
          const Tensor all = c.to_device(Tensor::from(ids));
          const Tensor dweight = c.zeros(rows[0].shape());
          const Tensor out = embedding(c, {.ids = all, .weight = rows[0], .out_dtype = dtype()});
          embedding_backward(c, {.ids = all, .dout = rows[1], .dweight = dweight});
          return Results{{out, dweight}, {}};
        });
}

TEST_P(Large, CrossEntropy) {
  const std::int64_t vocabulary = pick(16, 50280);
  check({.rows = {random({kPeriod, vocabulary})}, .shared = {}},
        [&](Context& c, const auto& rows, const auto& /*shared*/) {
          std::vector<std::int64_t> ids;
          for (std::int64_t i = 0; i < rows[0].size(0); ++i) ids.push_back(i % kPeriod);
          const Tensor targets = c.to_device(Tensor::from(ids));
          const Tensor dlogits = c.empty(rows[0].shape(), dtype());
          const CrossEntropyResult result = cross_entropy(c, {.logits = rows[0], .targets = targets});
          cross_entropy_backward(c, {.logits = rows[0], .targets = targets, .dlogits = dlogits});
          return Results{{result.losses, dlogits}, {}};
        });
}

TEST_P(Large, Activations) {
  const std::int64_t channels = pick(8, 4096);
  check({.rows = {random({kPeriod, channels}), random({kPeriod, channels})}, .shared = {}},
        [&](Context& c, const auto& rows, const auto& /*shared*/) {
          const Tensor dx = c.empty(rows[0].shape(), dtype());
          const Tensor dgate = c.empty(rows[0].shape(), dtype());
          const Tensor gated = gated_silu(c, {.x = rows[0], .gate = rows[1]});
          const Tensor curved = gelu(c, {.x = rows[0]});
          gated_silu_backward(c, {.x = rows[0], .gate = rows[1], .dout = rows[1], .dx = dx, .dgate = dgate});
          return Results{{gated, curved, dx, dgate}, {}};
        });
}

TEST_P(Large, Rotary) {
  const std::int64_t heads = pick(2, 64);
  check({.rows = {random({kPeriod, heads, 64})}, .shared = {}},
        [&](Context& c, const auto& rows, const auto& /*shared*/) {
          std::vector<std::int64_t> positions;
          for (std::int64_t i = 0; i < rows[0].size(0); ++i) positions.push_back(i % kPeriod);
          rotary_embedding(c, {.x = rows[0], .positions = c.to_device(Tensor::from(positions)), .dim = 32});
          return Results{{rows[0]}, {}};
        });
}

TEST_P(Large, Argmax) {
  const std::int64_t vocabulary = pick(16, 50280);
  check({.rows = {random({kPeriod, vocabulary})}, .shared = {}},
        [&](Context& c, const auto& rows, const auto& /*shared*/) {
          const Tensor ids = c.empty({rows[0].size(0)}, DType::i64);
          sample_rows(
              c, {.logits = rows[0], .vocab_size = vocabulary, .options = {.temperature = 0.0}, .ids = ids});
          return Results{{ids}, {}};
        });
}

TEST_P(Large, CopiesThatConvert) {
  const std::int64_t width = pick(8, 4096);
  check({.rows = {random({kPeriod, width})}, .shared = {}},
        [&](Context& c, const auto& rows, const auto& /*shared*/) {
          const Tensor halves = c.to(rows[0], DType::f16);
          const Tensor turned = c.empty({width, rows[0].size(0)}, dtype());
          c.copy(rows[0], turned.transpose(0, 1));
          const Tensor none = dropout(c, {.x = rows[0], .probability = 0.0});
          return Results{{halves, turned.transpose(0, 1), none}, {}};
        });
}

}  // namespace
}  // namespace krait
