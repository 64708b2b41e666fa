#include <algorithm>
#include <functional>
#include <sstream>

#include "bench/timing.h"
#include "krait/bench/bench.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/ops/attention.h"
#include "krait/ops/causal_conv1d.h"
#include "krait/ops/linear.h"
#include "krait/ops/norm.h"
#include "krait/ops/selective_scan.h"
#include "krait/ops/ssd.h"
#include "krait/ops/state_update.h"

namespace krait {
namespace {

using Shape = std::map<std::string, std::int64_t>;

// What a prepared operator costs, and how to run it.
struct Prepared {
  std::function<void()> run;
  double bytes = 0.0;
  double flops = 0.0;
};

class Inputs {
 public:
  Inputs(const Memory& memory, DType dtype, DType state_dtype)
      : memory_(memory), dtype_(dtype), state_dtype_(state_dtype) {}
  // Values in +-scale.
  Tensor operator()(const Dims& shape, float scale = 1.0F) { return make(shape, dtype_, -scale, scale); }
  Tensor f32(const Dims& shape, float low, float high) { return make(shape, DType::f32, low, high); }
  Tensor state(const Dims& shape) { return make(shape, state_dtype_, -1.0F, 1.0F); }

 private:
  // Large tensors repeat a stretch of random numbers, which is much faster than drawing them all.
  Tensor make(const Dims& shape, DType dtype, float low, float high) {
    constexpr std::int64_t kStretch = 4'000'037;
    const Tensor t = memory_.empty({numel_of(shape)}, dtype);
    const Tensor numbers = Tensor::empty({std::min(kStretch, t.numel())});
    for (float& value : numbers.span<float>()) value = low + (high - low) * rng_.uniform();
    const Tensor stretch = memory_.to_device(numbers.to(dtype));
    for (std::int64_t at = 0; at < t.numel(); at += kStretch) {
      const std::int64_t end = std::min(at + kStretch, t.numel());
      memory_.copy(stretch.slice(0, 0, end - at), t.slice(0, at, end));
    }
    return t.view(shape);
  }
  const Memory& memory_;
  DType dtype_;
  DType state_dtype_;
  Rng rng_{1};
};

double bytes_of(std::initializer_list<Tensor> tensors) {
  double bytes = 0.0;
  for (const Tensor& t : tensors) bytes += static_cast<double>(t.nbytes());
  return bytes;
}

Tensor channels_first(const Tensor& t) { return t.transpose(1, 2); }

SelectiveScanArgs scan_args(const Shape& s, Inputs& in) {
  const std::int64_t B = s.at("B"), D = s.at("D"), L = s.at("L"), N = s.at("N");
  SelectiveScanArgs a{.u = channels_first(in({B, L, D})),
                      .delta = channels_first(in({B, L, D})),
                      .A = in.f32({D, N}, -8.0F, -0.5F),
                      .B = channels_first(in({B, L, N})),
                      .C = channels_first(in({B, L, N})),
                      .D = in.f32({D}, 0.5F, 1.0F),
                      .z = channels_first(in({B, L, D})),
                      .delta_bias = in.f32({D}, -5.0F, -3.0F),
                      .delta_softplus = true};
  a.out = channels_first(in({B, L, D}));
  return a;
}

double scan_states(const SelectiveScanArgs& a) {
  return static_cast<double>(a.u.numel()) * static_cast<double>(a.A.size(1));
}

Prepared prepare_scan(Context& ctx, const Shape& s, Inputs& in) {
  const SelectiveScanArgs a = scan_args(s, in);
  return {.run = [&ctx, a] { selective_scan(ctx, a); },
          .bytes = bytes_of({a.u, a.delta, a.B, a.C, a.z, a.out}),
          .flops = scan_states(a) * 7.0};  // exp counted as one, two products, a multiply-add and its sum
}

// With the checkpoints of the forward, as training runs it.
Prepared prepare_scan_backward(Context& ctx, const Shape& s, Inputs& in) {
  SelectiveScanArgs forward = scan_args(s, in);
  forward.return_checkpoints = true;
  const auto like = [&in](const Tensor& t) { return channels_first(in(channels_first(t).shape())); };
  const SelectiveScanBackwardArgs a{.forward = forward,
                                    .dout = like(forward.u),
                                    .checkpoints = selective_scan(ctx, forward).checkpoints,
                                    .du = like(forward.u),
                                    .ddelta = like(forward.u),
                                    .dz = like(forward.u),
                                    .dB = like(forward.B),
                                    .dC = like(forward.C),
                                    .dA = in.f32(forward.A.shape(), 0.0F, 0.0F),
                                    .dD = in.f32(forward.D.shape(), 0.0F, 0.0F),
                                    .ddelta_bias = in.f32(forward.D.shape(), 0.0F, 0.0F)};
  return {.run = [&ctx, a] { selective_scan_backward(ctx, a); },
          .bytes = bytes_of({forward.u, forward.delta, forward.z, forward.B, forward.C, a.dout, a.du,
                             a.ddelta, a.dz, a.dB, a.dC, a.checkpoints}),
          .flops = scan_states(forward) * 21.0};  // the decay and state again, then eight products with sums
}

SsdArgs ssd_args(const Shape& s, Inputs& in) {
  const std::int64_t B = s.at("B"), L = s.at("L"), H = s.at("H"), P = s.at("P"), G = s.at("G"), N = s.at("N");
  SsdArgs a{.x = in({B, L, H, P}),
            .dt = in({B, L, H}),
            .A = in.f32({H}, -16.0F, -1.0F),
            .B = in({B, L, G, N}),
            .C = in({B, L, G, N}),
            .D = in.f32({H}, 0.5F, 1.0F),
            .dt_bias = in.f32({H}, -5.0F, -3.0F),
            .dt_softplus = true};
  a.out = in({B, L, H, P});
  return a;
}

Prepared prepare_ssd(Context& ctx, const Shape& s, Inputs& in) {
  const SsdArgs a = ssd_args(s, in);
  return {.run = [&ctx, a] { ssd(ctx, a); },
          .bytes = bytes_of({a.x, a.dt, a.B, a.C, a.out}),
          .flops = static_cast<double>(a.x.numel()) * static_cast<double>(s.at("N")) * 4.0};
}

Prepared prepare_ssd_backward(Context& ctx, const Shape& s, Inputs& in) {
  const SsdArgs f = ssd_args(s, in);
  const SsdBackwardArgs a{.forward = f,
                          .dout = in(f.x.shape()),
                          .dx = in(f.x.shape()),
                          .ddt = in(f.dt.shape()),
                          .dB = in(f.B.shape()),
                          .dC = in(f.C.shape()),
                          .dA = in.f32(f.A.shape(), 0.0F, 0.0F),
                          .dD = in.f32(f.D.shape(), 0.0F, 0.0F),
                          .ddt_bias = in.f32(f.dt_bias.shape(), 0.0F, 0.0F)};
  return {.run = [&ctx, a] { ssd_backward(ctx, a); },
          .bytes = bytes_of({f.x, f.dt, f.B, f.C, a.dout, a.dx, a.ddt, a.dB, a.dC}),
          .flops = static_cast<double>(f.x.numel()) * static_cast<double>(s.at("N")) * 10.0};
}

Prepared prepare_state_update(Context& ctx, const Shape& s, Inputs& in) {
  const std::int64_t B = s.at("B"), H = s.at("H"), P = s.at("P"), N = s.at("N");
  const StateUpdateArgs a{.state = in.state({B, H, P, N}),
                          .x = in({B, H, P}),
                          .dt = in({B, H}),
                          .A = in.f32({H}, -16.0F, -1.0F),
                          .B = in({B, N}),
                          .C = in({B, N}),
                          .D = in.f32({H}, 0.5F, 1.0F),
                          .dt_bias = in.f32({H}, -5.0F, -3.0F),
                          .dt_softplus = true};
  return {.run = [&ctx, a] { state_update(ctx, a); },
          .bytes = 2.0 * bytes_of({a.state}) + bytes_of({a.x, a.x}),
          .flops = static_cast<double>(a.state.numel()) * 5.0};
}

Prepared prepare_conv(Context& ctx, const Shape& s, Inputs& in) {
  const std::int64_t B = s.at("B"), D = s.at("D"), L = s.at("L"), K = s.at("K");
  CausalConv1dArgs a{.x = channels_first(in({B, L, D})),
                     .weight = in.f32({D, K}, -1.0F, 1.0F),
                     .bias = in.f32({D}, -1.0F, 1.0F),
                     .activation = Activation::silu};
  a.out = channels_first(in({B, L, D}));
  return {.run = [&ctx, a] { causal_conv1d(ctx, a); },
          .bytes = bytes_of({a.x, a.out}),
          .flops = 2.0 * static_cast<double>(B * D) * static_cast<double>(L * K)};
}

Prepared prepare_conv_backward(Context& ctx, const Shape& s, Inputs& in) {
  const std::int64_t B = s.at("B"), D = s.at("D"), L = s.at("L"), K = s.at("K");
  const CausalConv1dBackwardArgs a{.x = channels_first(in({B, L, D})),
                                   .weight = in.f32({D, K}, -1.0F, 1.0F),
                                   .bias = in.f32({D}, -1.0F, 1.0F),
                                   .activation = Activation::silu,
                                   .dout = channels_first(in({B, L, D})),
                                   .dx = channels_first(in({B, L, D})),
                                   .dweight = in.f32({D, K}, 0.0F, 0.0F),
                                   .dbias = in.f32({D}, 0.0F, 0.0F)};
  return {.run = [&ctx, a] { causal_conv1d_backward(ctx, a); },
          .bytes = bytes_of({a.x, a.dout, a.dx}),
          .flops = 6.0 * static_cast<double>(B * D) * static_cast<double>(L * K)};
}

Prepared prepare_norm(Context& ctx, const Shape& s, Inputs& in) {
  const std::int64_t T = s.at("T"), C = s.at("C");
  NormArgs a{.x = in({T, C}), .weight = in.f32({C}, 0.5F, 1.0F), .z = in({T, C}), .norm_before_gate = false};
  a.out = in({T, C});
  return {.run = [&ctx, a] { rms_norm(ctx, a); },
          .bytes = bytes_of({a.x, a.z, a.out}),
          .flops = static_cast<double>(a.x.numel()) * 8.0};
}

Prepared prepare_linear(Context& ctx, const Shape& s, Inputs& in) {
  const std::int64_t T = s.at("T"), I = s.at("I"), O = s.at("O");
  // Activations are f32 on a CPU whatever the weights are.
  LinearArgs a{.x = ctx.on_gpu() ? in({T, I}) : in.f32({T, I}, -1.0F, 1.0F), .weight = in({O, I})};
  a.out = ctx.on_gpu() ? in({T, O}) : in.f32({T, O}, 0.0F, 0.0F);
  return {.run = [&ctx, a] { linear(ctx, a); },
          .bytes = bytes_of({a.x, a.weight, a.out}),
          .flops = 2.0 * static_cast<double>(T * I) * static_cast<double>(O)};
}

Prepared prepare_attention(Context& ctx, const Shape& s, Inputs& in) {
  const std::int64_t L = s.at("L"), H = s.at("H"), G = s.at("G"), P = s.at("P");
  AttentionArgs a{.q = in({L, H, P}), .k = in({L, G, P}), .v = in({L, G, P}), .causal = true};
  a.out = in({L, H, P});
  return {.run = [&ctx, a] { attention(ctx, a); },
          .bytes = bytes_of({a.q, a.k, a.v, a.out}),
          .flops = 2.0 * static_cast<double>(L * L) * static_cast<double>(H * P)};
}

struct Entry {
  Shape defaults;
  Prepared (*prepare)(Context&, const Shape&, Inputs&);
};

std::map<std::string, Entry> entries() {
  return {
      {"selective_scan", {{{"B", 1}, {"D", 1536}, {"L", 512}, {"N", 16}}, prepare_scan}},
      {"selective_scan_backward", {{{"B", 1}, {"D", 1536}, {"L", 512}, {"N", 16}}, prepare_scan_backward}},
      {"ssd", {{{"B", 1}, {"L", 512}, {"H", 24}, {"P", 64}, {"G", 1}, {"N", 128}}, prepare_ssd}},
      {"ssd_backward",
       {{{"B", 2}, {"L", 256}, {"H", 24}, {"P", 64}, {"G", 1}, {"N", 128}}, prepare_ssd_backward}},
      {"state_update", {{{"B", 8}, {"H", 24}, {"P", 64}, {"N", 128}}, prepare_state_update}},
      {"causal_conv1d", {{{"B", 1}, {"D", 1792}, {"L", 512}, {"K", 4}}, prepare_conv}},
      {"causal_conv1d_backward", {{{"B", 1}, {"D", 1792}, {"L", 512}, {"K", 4}}, prepare_conv_backward}},
      {"gated_rms_norm", {{{"T", 512}, {"C", 1536}}, prepare_norm}},
      {"linear", {{{"T", 1}, {"I", 768}, {"O", 50280}}, prepare_linear}},
      {"attention", {{{"L", 512}, {"H", 12}, {"G", 12}, {"P", 64}}, prepare_attention}}};
}

}  // namespace

std::map<std::string, Shape> bench_ops() {
  std::map<std::string, Shape> known;
  for (const auto& [name, entry] : entries()) known[name] = entry.defaults;
  return known;
}

OpBench bench_op(Context& ctx, const std::string& name, const Shape& shape, DType dtype, std::int64_t repeat,
                 std::optional<DType> state_dtype) {
  const auto known = entries();
  const auto entry = known.find(name);
  if (entry == known.end()) {
    std::string list;
    for (const auto& item : known) list += (list.empty() ? "" : ", ") + item.first;
    fail(ErrorKind::invalid_argument, "bench op: no operator ", name, ", expected one of ", list);
  }
  require(repeat >= 1, "bench op: repeat is ", repeat, ", expected at least 1");
  Shape full = entry->second.defaults;
  std::string letters;
  for (const auto& item : full) letters += (letters.empty() ? "" : ", ") + item.first;
  for (const auto& [letter, size] : shape) {
    require(full.contains(letter), "bench op ", name, ": shape has ", letter, ", expected ", letters);
    require(size >= 1 && size <= (std::int64_t{1} << 32), "bench op ", name, ": ", letter, " is ", size,
            ", expected at least 1");
    full[letter] = size;
  }
  Inputs inputs(ctx.memory(), dtype, state_dtype.value_or(dtype));
  const Prepared prepared = entry->second.prepare(ctx, full, inputs);
  OpBench result{.name = name, .bytes = prepared.bytes, .flops = prepared.flops};
  result.dtype = name_of(dtype);
  if (name == "state_update") result.dtype += concat(", state ", state_dtype.value_or(dtype));
  for (const auto& [letter, size] : full)
    result.shape += concat(result.shape.empty() ? "" : ",", letter, "=", size);
  prepared.run();
  result.backend = ctx.backend();
  ctx.synchronize();
  // A call returns when its work is queued on a GPU: several in a row hide what queueing costs.
  const int runs = ctx.on_gpu() ? 10 : 1;
  std::vector<double> times;
  for (std::int64_t i = 0; i < repeat; ++i)
    times.push_back(seconds_of([&] {
                      for (int j = 0; j < runs; ++j) prepared.run();
                      ctx.synchronize();
                    }) /
                    runs);
  result.seconds = median(times);
  result.ceilings = measure_ceilings(ctx);
  return result;
}

}  // namespace krait
