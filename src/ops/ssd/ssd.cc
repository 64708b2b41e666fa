#include "krait/ops/ssd.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "core/build.h"
#include "krait/core/error.h"
#include "ops/ssd/arguments.h"
#include "ops/ssd/kernels.h"
#include "ops/ssd/problem.h"

namespace krait {
namespace ssd_detail {
namespace {

constexpr std::string_view kOp = "ssd";

void check_destination(std::string_view name, const Tensor& to, const Problem& p) {
  const auto apart = [&](std::string_view other, const Tensor& t) {
    require(!may_overlap(to, t), "[ssd] ", name, " overlaps ", other);
  };
  apart("x", p.x);
  apart("dt", p.dt);
  apart("A", p.A);
  apart("B", p.B);
  apart("C", p.C);
  apart("D", p.D);
  apart("z", p.z);
  apart("dt_bias", p.dt_bias);
}

std::string_view name_of(SsdPath path) {
  switch (path) {
    case SsdPath::reference: return "reference";
    case SsdPath::recurrent: return "recurrent";
    default: return "chunked";
  }
}

}  // namespace

std::int64_t choose_heads_per_block(std::int64_t independent, std::int64_t heads_per_group,
                                    std::int64_t state_size, std::int64_t threads) {
  // The states of a block stay in the second-level cache.
  constexpr std::int64_t kStateFloats = 128 * 1024;
  const std::int64_t fitting =
      std::max<std::int64_t>(kStateFloats / std::max<std::int64_t>(state_size, 1), 1);
  // Work that divides evenly needs one block a thread; else some more, to even it out.
  const std::int64_t wanted = independent % threads == 0 || independent == 1 ? threads : 4 * threads;
  const std::int64_t blocks = (wanted + independent - 1) / std::max<std::int64_t>(independent, 1);
  const std::int64_t even = (heads_per_group + blocks - 1) / std::max<std::int64_t>(blocks, 1);
  return std::clamp<std::int64_t>(std::min(even, fitting), 1, std::max<std::int64_t>(heads_per_group, 1));
}

SsdResult run(Context& ctx, std::string_view op, Problem p, const Wanted& wanted) {
  const bool is_double = p.x.dtype() == DType::f64;
  const DType state_dtype = is_double ? DType::f64 : DType::f32;
  const std::int64_t rows = p.x.size(0);
  require(!is_double || wanted.path == SsdPath::automatic || wanted.path == SsdPath::reference, "[", op,
          "] the path ", name_of(wanted.path), " takes f32, bf16 or f16, x has dtype f64");
  const TokenRuns runs = cut_into_runs(rows, p.x.size(1), wanted.seq_idx, wanted.cu_seqlens,
                                       wanted.state_positions, wanted.reverse);
  p.runs = &runs;

  if (!p.out) p.out = ctx.empty(p.x.shape(), p.x.dtype());
  if (wanted.final_states && !p.final_states)
    p.final_states = ctx.empty({runs.sequences, p.heads(), p.headdim(), p.d_state()}, state_dtype);
  if (wanted.state_positions && !p.states)
    p.states =
        ctx.empty({rows, wanted.state_positions.size(1), p.heads(), p.headdim(), p.d_state()}, state_dtype);
  // The first run of a sequence reads what its last one, on another thread, may replace.
  if (static_cast<std::int64_t>(runs.runs.size()) > runs.sequences &&
      same_view(p.final_states, p.initial_states))
    p.initial_states = ctx.clone(p.initial_states);

  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) {
      run_cuda(ctx, p);
      ctx.set_backend(op, "cuda");
      return {p.out, p.final_states, p.states};
    }
  }

  std::int64_t longest = 0;
  for (const TokenRun& r : runs.runs) longest = std::max(longest, r.count);
  SsdChoice choice = choose_ssd(longest, p.headdim(), p.d_state());
  if (wanted.path != SsdPath::automatic)
    choice.path = wanted.path;
  else if (is_double || ctx.reference())
    choice.path = SsdPath::reference;
  if (wanted.chunk_size > 0) choice.chunk_size = wanted.chunk_size;
  p.chunk_size = std::clamp<std::int64_t>(std::min(choice.chunk_size, longest), 1, kMaxChunk);

  if (choice.path == SsdPath::reference) {
    run_reference(ctx, p);
  } else {
    widen_parameters(ctx, p);
    if (choice.path == SsdPath::recurrent)
      run_recurrent(ctx, p);
    else
      run_chunked(ctx, p);
  }
  for (const auto& [row, position] : runs.padding) p.out.select(0, row).select(0, position).fill(0.0);
  ctx.set_backend(op, choice.path == SsdPath::reference
                          ? "reference"
                          : concat(name_of(choice.path), " (", simd_target(), ")"));
  return {p.out, p.final_states, p.states};
}

}  // namespace ssd_detail

SsdChoice choose_ssd(std::int64_t length, std::int64_t headdim, std::int64_t d_state) {
  // Below this the products of a chunk are too thin for their tiles.
  constexpr std::int64_t kShortest = 16;
  // For each token and head, in multiply-adds: two products with states, none of them in a single chunk, and
  // what passes over states take; the product with the masked matrix, and its exponentials.
  const std::int64_t state = headdim * d_state;
  const auto cost = [&](std::int64_t chunk) {
    const std::int64_t chunks = std::max<std::int64_t>((length + chunk - 1) / chunk, 1);
    return (2 * state + 12 * state / chunk) * (chunks - 1) / chunks + chunk * (headdim + 20) / 2;
  };
  std::int64_t best = 32;
  for (const std::int64_t chunk : {std::int64_t{64}, std::int64_t{128}, ssd_detail::kMaxChunk})
    if (cost(chunk) < cost(best)) best = chunk;
  return {.path = length < kShortest ? SsdPath::recurrent : SsdPath::chunked, .chunk_size = best};
}

SsdResult ssd(Context& ctx, const SsdArgs& given) {
  using namespace ssd_detail;
  SsdArgs args = given;
  bring_to_device(ctx, kOp, args);
  Problem problem = problem_of(kOp, args);
  problem.out = args.out;
  problem.final_states = args.final_states;
  const Tensor& x = args.x;
  if (args.out) {
    check(kOp, "out", args.out, x, x.shape(), "as x");
    require(args.out.dtype() == x.dtype(), "[ssd] out has dtype ", args.out.dtype(), ", expected ", x.dtype(),
            " as x");
    check_destination("out", args.out, problem);
    require(!may_overlap(args.out, args.initial_states), "[ssd] out overlaps initial_states");
  }
  if (args.final_states) {
    const DType state_dtype = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
    check(kOp, "final_states", args.final_states, x, state_shape_of(args),
          "one state for each sequence and head");
    require(args.final_states.dtype() == state_dtype, "[ssd] final_states has dtype ",
            args.final_states.dtype(), ", expected ", state_dtype);
    check_destination("final_states", args.final_states, problem);
    require(!may_overlap(args.final_states, args.out), "[ssd] final_states overlaps out");
    require(same_view(args.final_states, args.initial_states) ||
                !may_overlap(args.final_states, args.initial_states),
            "[ssd] final_states overlaps initial_states without being the same view");
  }
  require(!args.states || args.state_positions,
          "[ssd] states is given without state_positions, expected both");
  if (args.states) {
    const DType state_dtype = x.dtype() == DType::f64 ? DType::f64 : DType::f32;
    check(kOp, "states", args.states, x,
          {x.size(0), args.state_positions.size(1), x.size(2), x.size(3), args.B.size(3)},
          "one state for each position and head");
    require(args.states.dtype() == state_dtype, "[ssd] states has dtype ", args.states.dtype(), ", expected ",
            state_dtype);
    check_destination("states", args.states, problem);
    for (const Tensor& other : {args.initial_states, args.out, args.final_states})
      require(!may_overlap(args.states, other), "[ssd] states overlaps another tensor");
    problem.states = args.states;
  }
  return run(ctx, kOp, problem,
             {.seq_idx = args.seq_idx,
              .cu_seqlens = args.cu_seqlens,
              .state_positions = args.state_positions,
              .reverse = args.reverse,
              .final_states = args.return_final_states || args.final_states.defined(),
              .chunk_size = args.chunk_size,
              .path = args.path});
}

}  // namespace krait
