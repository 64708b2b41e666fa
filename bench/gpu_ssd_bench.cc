// SSD's forward as a layer of a model calls it (inputs inside of what in_proj and the convolution wrote,
// states read and written, decays of any length), beside the call on tensors of its own:
//   bench_gpu_ssd [cuda:N]
#include <cmath>
#include <cstdio>
#include <span>
#include <string>

#include "gpu_timing.h"
#include "krait/core/context.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/ops/ssd.h"

namespace {

using namespace krait;

constexpr std::int64_t kHeads = 80;
constexpr std::int64_t kHeaddim = 64;
constexpr std::int64_t kState = 128;

struct Call {
  std::int64_t length = 2048;
  DType dtype = DType::bf16;
  bool inside = false;     // inputs are columns of wider tensors
  bool states = false;     // read and written
  bool slow = false;       // steps of 0.001 to 0.1 instead of about 0.7
  bool scattered = false;  // the L2 cache holds other things
};

Tensor random(Context& ctx, Rng& rng, const Dims& shape, DType dtype, float low, float high) {
  // Long tensors repeat themselves: drawing numbers would take longer than all else.
  constexpr std::size_t kDrawn = 1'000'003;
  const Tensor numbers = Tensor::empty(shape);
  const std::span<float> all = numbers.span<float>();
  for (std::size_t i = 0; i < all.size(); ++i)
    all[i] = i < kDrawn ? low + (high - low) * rng.uniform() : all[i - kDrawn];
  return ctx.to_device(numbers.to(dtype));
}

void measure(Context& ctx, const Call& call) {
  Rng rng(1);
  const std::int64_t L = call.length;
  const std::int64_t inner = kHeads * kHeaddim;
  const Tensor convolved = random(ctx, rng, {1, L, inner + 2 * kState}, call.dtype, -1.0F, 1.0F);
  const Tensor projected = random(ctx, rng, {1, L, call.inside ? 2 * inner + 2 * kState + kHeads : kHeads},
                                  call.dtype, -1.0F, 1.0F);
  Tensor x = convolved.slice(2, 0, inner).view({1, L, kHeads, kHeaddim});
  Tensor b = convolved.slice(2, inner, inner + kState).view({1, L, 1, kState});
  Tensor c = convolved.slice(2, inner + kState, inner + 2 * kState).view({1, L, 1, kState});
  if (!call.inside) {
    x = ctx.clone(x);
    b = ctx.clone(b);
    c = ctx.clone(c);
  }
  const Tensor dt = projected.slice(2, projected.size(2) - kHeads, projected.size(2));
  const Tensor bias = Tensor::empty({kHeads});
  for (float& v : bias.span<float>()) {
    const float d = 0.001F * std::pow(100.0F, rng.uniform());
    v = call.slow ? d + std::log(-std::expm1(-d)) : 0.0F;
  }
  SsdArgs args{.x = x,
               .dt = dt,
               .A = random(ctx, rng, {kHeads}, DType::f32, -16.0F, -1.0F),
               .B = b,
               .C = c,
               .D = random(ctx, rng, {kHeads}, DType::f32, 1.0F, 1.0F),
               .dt_bias = ctx.to_device(bias),
               .dt_softplus = true};
  args.out = ctx.empty(x.shape(), call.dtype);
  if (call.states) {
    args.initial_states = random(ctx, rng, {1, kHeads, kHeaddim, kState}, DType::f32, -1.0F, 1.0F);
    args.final_states = args.initial_states;
    args.return_final_states = true;
  }
  const Tensor other = ctx.empty({call.scattered ? 50'000'000 : 1});
  const auto once = [&] { ssd(ctx, args); };
  const auto scatter = [&] {
    if (call.scattered) ctx.fill(other, 0.0);
  };
  double seconds = seconds_of_call(ctx, 5, 20, [&] {
    scatter();
    once();
  });
  if (call.scattered) seconds -= seconds_of_call(ctx, 5, 20, scatter);
  std::printf("ssd L%-6ld %-5s %s%s%s%s %8.1f us\n", static_cast<long>(L), name_of(call.dtype).data(),
              call.inside ? "inside " : "own    ", call.states ? "states " : "       ",
              call.slow ? "slow " : "fast ", call.scattered ? "cold" : "warm", 1e6 * seconds);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Context ctx({.device = parse_device(argc > 1 ? argv[1] : "cuda")});
    for (const std::int64_t length : {512, 2048, 8192, 65536})
      for (const DType dtype : {DType::bf16, DType::f16})
        for (int k = 0; k < 16; ++k) {
          // All combinations at one length, of the others what tells most.
          const bool few = length == 65536 ? k == 0 || k == 4 || k == 7 : k % 4 == 0 || k == 15;
          if (length != 2048 && !few) continue;
          measure(ctx, {.length = length,
                        .dtype = dtype,
                        .inside = (k & 1) != 0,
                        .states = (k & 2) != 0,
                        .slow = (k & 4) != 0,
                        .scattered = (k & 8) != 0});
        }
  } catch (const Error& e) {
    std::fprintf(stderr, "bench_gpu_ssd: %s\n", e.what());
    return 1;
  }
}
