// The entry of ssd_backward: validation, destinations, the choice of path and of chunks.
#include "ops/ssd/backward.h"

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/ssd.h"
#include "ops/ssd/arguments.h"
#include "ops/ssd/kernels.h"

namespace krait {
namespace ssd_detail {
namespace {

constexpr std::string_view kOp = "ssd_backward";

using Named = std::pair<std::string_view, Tensor>;

void check_destinations(const SsdBackwardArgs& args) {
  const SsdArgs& f = args.forward;
  const Tensor& x = f.x;
  const auto like = [&](std::string_view name, const Tensor& t, std::string_view of, const Tensor& model) {
    if (!t) return;
    require(model.defined(), "[", kOp, "] ", name, " is wanted, but ", of, " is not given");
    check(kOp, name, t, x, model.shape(), concat("as ", of));
  };
  like("dx", args.dx, "x", x);
  like("ddt", args.ddt, "dt", f.dt);
  like("dB", args.dB, "B", f.B);
  like("dC", args.dC, "C", f.C);
  like("dz", args.dz, "z", f.z);
  like("dA", args.dA, "A", f.A);
  like("dD", args.dD, "D", f.D);
  like("ddt_bias", args.ddt_bias, "dt_bias", f.dt_bias);
  if (args.dinitial_states)
    check(kOp, "dinitial_states", args.dinitial_states, x, state_shape_of(f),
          "one state for each sequence and head");
  for (const auto& [name, t] : {Named{"dA", args.dA}, Named{"dD", args.dD}, Named{"ddt_bias", args.ddt_bias}})
    require(!t || t.dtype() == DType::f32 || t.dtype() == DType::f64, "[", kOp, "] ", name, " has dtype ",
            t ? t.dtype() : DType::f32, ", expected f32: gradients are added to it");

  const std::vector<Named> inputs = {{"x", x},
                                     {"dt", f.dt},
                                     {"A", f.A},
                                     {"B", f.B},
                                     {"C", f.C},
                                     {"D", f.D},
                                     {"z", f.z},
                                     {"dt_bias", f.dt_bias},
                                     {"initial_states", f.initial_states},
                                     {"dout", args.dout},
                                     {"dfinal_states", args.dfinal_states}};
  const std::vector<Named> destinations = {
      {"dx", args.dx}, {"ddt", args.ddt}, {"dB", args.dB},
      {"dC", args.dC}, {"dz", args.dz},   {"dinitial_states", args.dinitial_states},
      {"dA", args.dA}, {"dD", args.dD},   {"ddt_bias", args.ddt_bias}};
  for (std::size_t i = 0; i < destinations.size(); ++i) {
    const auto& [name, t] = destinations[i];
    for (const auto& [other, input] : inputs)
      require(!may_overlap(t, input) ||
                  (name == "dinitial_states" && other == "dfinal_states" && same_view(t, input)),
              "[", kOp, "] ", name, " overlaps ", other);
    for (std::size_t j = 0; j < i; ++j)
      require(!may_overlap(t, destinations[j].second), "[", kOp, "] ", name, " overlaps ",
              destinations[j].first);
  }
}

BackwardProblem backward_problem_of(const SsdBackwardArgs& args) {
  const Problem forward = problem_of(kOp, args.forward);
  const Tensor& x = args.forward.x;
  require(args.dout.defined(), "[", kOp, "] dout must be given");
  check(kOp, "dout", args.dout, x, x.shape(), "as x");
  if (args.dfinal_states)
    check(kOp, "dfinal_states", args.dfinal_states, x, state_shape_of(args.forward),
          "one state for each sequence and head");
  check_destinations(args);
  const SsdPath path = args.forward.path;
  require(x.dtype() != DType::f64 || path == SsdPath::automatic || path == SsdPath::reference, "[", kOp,
          "] the path ", path == SsdPath::chunked ? "chunked" : "recurrent",
          " takes f32, bf16 or f16, x has dtype f64");
  return {.forward = forward,
          .dout = args.dout,
          .dfinal_states = args.dfinal_states,
          .dx = args.dx,
          .ddt = args.ddt,
          .dB = args.dB,
          .dC = args.dC,
          .dz = args.dz,
          .dinitial_states = args.dinitial_states,
          .dA = args.dA,
          .dD = args.dD,
          .ddt_bias = args.ddt_bias};
}

}  // namespace

BackwardCut choose_backward(std::int64_t independent, std::int64_t longest, std::int64_t heads_per_group,
                            std::int64_t headdim, std::int64_t d_state, std::int64_t chunk_size) {
  // Blocks of heads that give many threads work, if each has enough heads to share the products of the group.
  constexpr std::int64_t kBlocks = 8;
  // The states before a block's chunks are all kept.
  constexpr std::int64_t kStateFloats = std::int64_t{4} << 20;
  const std::int64_t heads = std::max<std::int64_t>(heads_per_group, 1);
  const std::int64_t wanted = (kBlocks + independent - 1) / std::max<std::int64_t>(independent, 1);
  const std::int64_t state = headdim * d_state;
  longest = std::max<std::int64_t>(longest, 1);

  const auto cut_with = [&](std::int64_t chunk) {
    const std::int64_t chunks = std::max<std::int64_t>((longest + chunk - 1) / chunk, 1);
    // Chunks of one length, in whole vectors.
    chunk = std::min({chunk, longest, ((longest + chunks - 1) / chunks + 15) / 16 * 16});
    // For each token and head, in multiply-adds: five products with states, two with the pairs of the chunk,
    // and what passes over states and pairs take, as measured; three products with the pairs of the group.
    const std::int64_t carried = 5 * state + 40 * state / chunk;
    const std::int64_t own = carried * (chunks - 1) / chunks + chunk * (headdim + 15);
    const std::int64_t shared = 3 * chunk * d_state / 2;
    const std::int64_t least = 4 * shared / own + 1;  // heads, so that sharing adds at most a quarter
    const std::int64_t fitting =
        std::max<std::int64_t>(kStateFloats / std::max<std::int64_t>(chunks * state, 1), 1);
    const std::int64_t blocks =
        std::max(std::clamp<std::int64_t>(heads / least, 1, wanted), (heads + fitting - 1) / fitting);
    const std::int64_t together = (heads + blocks - 1) / blocks;
    return std::pair(BackwardCut{.chunk_size = chunk, .heads = together}, own + shared / together);
  };

  if (chunk_size > 0) {
    chunk_size = std::min({chunk_size, longest, kMaxChunk});
    return {.chunk_size = chunk_size, .heads = cut_with(chunk_size).first.heads};
  }
  auto best = cut_with(32);
  for (const std::int64_t chunk : {std::int64_t{64}, std::int64_t{128}, kMaxChunk}) {
    const auto other = cut_with(chunk);
    if (other.second < best.second) best = other;
  }
  return best.first;
}

}  // namespace ssd_detail

void ssd_backward(Context& ctx, const SsdBackwardArgs& given) {
  using namespace ssd_detail;
  // Of the forward's own outputs nothing is needed.
  SsdBackwardArgs args = given;
  args.forward.out = args.forward.final_states = args.forward.state_positions = {};
  bring_to_device(ctx, kOp, args.forward);
  require_on_device(ctx, kOp,
                    {{"dout", args.dout},
                     {"dfinal_states", args.dfinal_states},
                     {"dx", args.dx},
                     {"ddt", args.ddt},
                     {"dB", args.dB},
                     {"dC", args.dC},
                     {"dz", args.dz},
                     {"dinitial_states", args.dinitial_states},
                     {"dA", args.dA},
                     {"dD", args.dD},
                     {"ddt_bias", args.ddt_bias}});
  BackwardProblem p = backward_problem_of(args);
  const SsdArgs& f = args.forward;
  const TokenRuns runs = cut_into_runs(f.x.size(0), f.x.size(1), f.seq_idx, f.cu_seqlens, {}, f.reverse);
  p.forward.runs = &runs;
  const bool reference = f.x.dtype() == DType::f64 || f.path == SsdPath::reference ||
                         (f.path == SsdPath::automatic && ctx.reference());
  if (reference) {
    run_reference_backward(ctx, p);
    ctx.set_backend(kOp, "reference");
    return;
  }

  // The last run of a sequence reads what its first one, on another thread, replaces.
  if (static_cast<std::int64_t>(runs.runs.size()) > runs.sequences &&
      same_view(p.dfinal_states, p.dinitial_states))
    p.dfinal_states = ctx.clone(p.dfinal_states);
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      run_cuda_backward(ctx, p);
      ctx.set_backend(kOp, "cuda");
      return;
    }
  }
  p.forward.chunk_size = f.chunk_size;
  widen_parameters(ctx, p.forward);
  run_chunked_backward(ctx, p);
  for (const Tensor* t : {&p.dx, &p.ddt, &p.dB, &p.dC, &p.dz})
    if (*t)
      for (const auto& [row, position] : runs.padding) t->select(0, row).select(0, position).fill(0.0);
  ctx.set_backend(kOp, concat("chunked (", simd_target(), ")"));
}

}  // namespace krait
