#include "krait/ops/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string_view>

#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/attention/kernels.h"

namespace krait {
namespace attention_kernels {

Plan make_plan(const Problem& p) {
  Plan plan{.rows = p.queries * p.group};
  plan.row_blocks = (plan.rows + kBlockRows - 1) / kBlockRows;
  // Enough tasks for many threads, from parts of the keys that are worth a task.
  constexpr std::int64_t kTasks = 64;
  constexpr std::int64_t kKeysOfTask = 512;
  const std::int64_t blocks = p.heads_kv * plan.row_blocks;
  if (blocks > 0)
    plan.splits = std::clamp<std::int64_t>(p.keys / kKeysOfTask, 1, (kTasks + blocks - 1) / blocks);
  return plan;
}

}  // namespace attention_kernels

namespace {

using attention_kernels::Operand;
using attention_kernels::Plan;
using attention_kernels::Problem;

void require_operand(std::string_view name, const Tensor& t, std::string_view shape) {
  require(t.defined(), "[attention] ", name, " is missing");
  require(t.ndim() == 3, "[attention] ", name, " has shape ", t.shape(), ", expected ", shape);
  require(is_float(t.dtype()), "[attention] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
}

void validate(const AttentionArgs& args) {
  const Tensor& q = args.q;
  const Tensor& k = args.k;
  const Tensor& v = args.v;
  require_operand("q", q, "(Lq, H, head_dim)");
  require_operand("k", k, "(Lk, Hkv, head_dim)");
  require_operand("v", v, "(Lk, Hkv, head_dim_v)");
  require(k.size(2) == q.size(2), "[attention] k has shape ", k.shape(), ", expected (Lk, Hkv, ", q.size(2),
          "): the head_dim of q");
  require(v.size(0) == k.size(0) && v.size(1) == k.size(1), "[attention] v has shape ", v.shape(),
          ", expected (", k.size(0), ", ", k.size(1), ", head_dim_v): the positions and heads of k");
  require(k.dtype() == v.dtype(), "[attention] v has dtype ", v.dtype(), ", expected ", k.dtype(),
          ": that of k");
  require(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "[attention] q has ", q.size(1),
          " heads, expected a multiple of the ", k.size(1), " heads of k");
  require(!args.causal || k.size(0) >= q.size(0), "[attention] ", q.size(0), " queries and ", k.size(0),
          " keys, expected at least as many keys where causal");
  require(std::isfinite(args.scale), "[attention] scale is ", args.scale, ", expected a number");
  if (!args.out) return;
  const Dims expected{q.size(0), q.size(1), v.size(2)};
  require_operand("out", args.out, "(Lq, H, head_dim_v)");
  require(args.out.shape() == expected, "[attention] out has shape ", args.out.shape(), ", expected ",
          expected);
}

bool use_simd(const Context& ctx, const AttentionArgs& args, const Tensor& out) {
  const auto wide = [](const Tensor& t) { return t.dtype() == DType::f64; };
  const bool any_wide = wide(args.q) || wide(args.k) || wide(args.v) || wide(out);
  if (args.path == AttentionPath::simd)
    require(!any_wide, "[attention] the simd path has no f64, expected f32, bf16 or f16");
  return args.path == AttentionPath::simd ||
         (args.path == AttentionPath::automatic && !ctx.reference() && !any_wide);
}

Operand operand(const Tensor& t) {
  return {.data = t.raw(),
          .dtype = t.dtype(),
          .position_stride = t.stride(0),
          .head_stride = t.stride(1),
          .channel_stride = t.stride(2)};
}

void run_simd(Context& ctx, const Problem& problem) {
  const Plan plan = attention_kernels::make_plan(problem);
  const std::int64_t tasks = plan.tasks(problem);
  const std::int64_t workers = std::min<std::int64_t>(ctx.threads(), tasks);
  const std::int64_t floats = attention_kernels::workspace_floats(problem);
  const Tensor workspace = ctx.empty({workers, floats});
  const Tensor partials = ctx.empty({attention_kernels::partial_floats(problem, plan)});
  // Causal tasks differ in length: workers take the next one as they finish.
  std::atomic<std::int64_t> next{0};
  parallel_for(ctx, workers, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker)
      for (std::int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1))
        attention_kernels::run_task(problem, plan, tasks - 1 - i, workspace.data<float>() + worker * floats,
                                    partials.data<float>());
  });
  if (plan.splits == 1) return;
  parallel_for(ctx, problem.heads_kv * plan.row_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block)
      attention_kernels::merge(problem, plan, block, partials.data<float>());
  });
}

}  // namespace

Tensor attention(Context& ctx, const AttentionArgs& args) {
  validate(args);
  const Tensor& q = args.q;
  const Tensor out = args.out ? args.out : ctx.empty({q.size(0), q.size(1), args.v.size(2)}, q.dtype());
  const bool simd = use_simd(ctx, args, out);
  ctx.set_backend("attention", simd ? "simd" : "reference");
  if (out.numel() == 0) return out;
  const std::int64_t head_dim = q.size(2);
  const double default_scale = head_dim > 0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : 1.0;
  const Problem problem{.queries = q.size(0),
                        .keys = args.k.size(0),
                        .heads_kv = args.k.size(1),
                        .group = q.size(1) / args.k.size(1),
                        .head_dim = head_dim,
                        .head_dim_v = args.v.size(2),
                        .causal = args.causal,
                        .scale = args.scale == 0.0 ? default_scale : args.scale,
                        .q = operand(q),
                        .k = operand(args.k),
                        .v = operand(args.v),
                        .out = operand(out)};
  if (simd)
    run_simd(ctx, problem);
  else
    attention_kernels::reference(problem);
  return out;
}

}  // namespace krait
