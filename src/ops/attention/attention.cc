#include "krait/ops/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <string_view>

#include "core/build.h"
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

BackwardPlan make_backward_plan(const Problem& p) {
  BackwardPlan plan;
  plan.row_blocks = (p.queries * p.group + kBlockRows - 1) / kBlockRows;
  plan.key_blocks = (p.keys + kBlockKeys - 1) / kBlockKeys;
  // Enough tasks for many threads, from rows that are worth sums of dk and dv of their own.
  constexpr std::int64_t kTasks = 32;
  constexpr std::int64_t kBlocksOfTask = 4;
  if (p.heads_kv > 0)
    plan.splits =
        std::clamp<std::int64_t>(plan.row_blocks / kBlocksOfTask, 1, (kTasks + p.heads_kv - 1) / p.heads_kv);
  return plan;
}

gpu::GpuPlan gpu::make_gpu_plan(const Problem& p) {
  const std::int64_t rows = p.queries * p.group;
  const auto packed = [](const Operand& o) {
    const auto element = static_cast<std::int64_t>(size_of(o.dtype));
    return o.channel_stride == 1 && reinterpret_cast<std::uintptr_t>(o.data) % 16 == 0 &&
           o.position_stride * element % 16 == 0 && o.head_stride * element % 16 == 0;
  };
  GpuPlan plan{.packed_keys = packed(p.k), .packed_values = packed(p.v)};
  // q of a block stays in shared memory, and 256 threads hold 8 channels each.
  if (rows <= 2 * kFewRows && p.head_dim <= 2048 && p.head_dim_v > 0 && p.head_dim_v <= 2048) {
    plan.rows_of_block = rows == 1 ? 1 : kFewRows;
    plan.channels_of_block = p.head_dim_v;
  }
  plan.row_blocks = (rows + plan.rows_of_block - 1) / plan.rows_of_block;
  plan.channel_blocks =
      std::max<std::int64_t>(1, (p.head_dim_v + plan.channels_of_block - 1) / plan.channels_of_block);
  // Enough tasks for a few on each multiprocessor, from parts of the keys that are worth a task.
  constexpr std::int64_t kTasks = 512;
  constexpr std::int64_t kLeastKeys = 256;
  constexpr std::int64_t kStep = 128;
  const std::int64_t blocks = plan.row_blocks * plan.channel_blocks * p.heads_kv;
  if (blocks > 0)
    plan.splits = std::clamp<std::int64_t>(p.keys / kLeastKeys, 1, (kTasks + blocks - 1) / blocks);
  const std::int64_t keys_of_split = (p.keys + plan.splits - 1) / plan.splits;
  plan.keys_of_split = std::max<std::int64_t>(1, (keys_of_split + kStep - 1) / kStep) * kStep;
  plan.splits = std::max<std::int64_t>(1, (p.keys + plan.keys_of_split - 1) / plan.keys_of_split);
  return plan;
}

}  // namespace attention_kernels

namespace {

using attention_kernels::BackwardPlan;
using attention_kernels::Gradients;
using attention_kernels::Operand;
using attention_kernels::Plan;
using attention_kernels::Problem;

void require_operand(std::string_view op, std::string_view name, const Tensor& t, std::string_view shape) {
  require(t.defined(), "[", op, "] ", name, " is missing");
  require(t.ndim() == 3, "[", op, "] ", name, " has shape ", t.shape(), ", expected ", shape);
  require(is_float(t.dtype()), "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
}

// Args: of the forward or the backward.
template <typename Args>
void validate_inputs(std::string_view op, const Args& args) {
  const Tensor& q = args.q;
  const Tensor& k = args.k;
  const Tensor& v = args.v;
  require_operand(op, "q", q, "(Lq, H, head_dim)");
  require_operand(op, "k", k, "(Lk, Hkv, head_dim)");
  require_operand(op, "v", v, "(Lk, Hkv, head_dim_v)");
  require(k.size(2) == q.size(2), "[", op, "] k has shape ", k.shape(), ", expected (Lk, Hkv, ", q.size(2),
          "): the head_dim of q");
  require(v.size(0) == k.size(0) && v.size(1) == k.size(1), "[", op, "] v has shape ", v.shape(),
          ", expected (", k.size(0), ", ", k.size(1), ", head_dim_v): the positions and heads of k");
  require(k.dtype() == v.dtype(), "[", op, "] v has dtype ", v.dtype(), ", expected ", k.dtype(),
          ": that of k");
  require(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "[", op, "] q has ", q.size(1),
          " heads, expected a multiple of the ", k.size(1), " heads of k");
  require(!args.causal || k.size(0) >= q.size(0), "[", op, "] ", q.size(0), " queries and ", k.size(0),
          " keys, expected at least as many keys where causal");
  require(std::isfinite(args.scale), "[", op, "] scale is ", args.scale, ", expected a number");
}

void require_shape(std::string_view op, std::string_view name, const Tensor& t, const Dims& expected) {
  require(t.defined(), "[", op, "] ", name, " is missing");
  require(t.shape() == expected, "[", op, "] ", name, " has shape ", t.shape(), ", expected ", expected);
  require(is_float(t.dtype()), "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
}

void require_logsumexp(std::string_view op, const Tensor& t, const Tensor& q) {
  require_shape(op, "logsumexp", t, {q.size(0), q.size(1)});
  require(t.dtype() == DType::f32 || t.dtype() == DType::f64, "[", op, "] logsumexp has dtype ", t.dtype(),
          ", expected f32, or f64 for the reference");
}

bool use_simd(const Context& ctx, std::string_view op, AttentionPath path,
              std::initializer_list<Tensor> tensors) {
  const bool any_wide = std::any_of(tensors.begin(), tensors.end(),
                                    [](const Tensor& t) { return t && t.dtype() == DType::f64; });
  if (path == AttentionPath::simd)
    require(!any_wide, "[", op, "] the simd path has no f64, expected f32, bf16 or f16");
  return path == AttentionPath::simd || (path == AttentionPath::automatic && !ctx.reference() && !any_wide);
}

void require_gpu_path(const Context& ctx, std::string_view op, AttentionPath path,
                      std::initializer_list<Tensor> tensors) {
  require(path == AttentionPath::automatic, "[", op, "] a path of the CPU was asked for on ",
          name_of(ctx.device()), ", expected automatic");
  for (const Tensor& t : tensors)
    require(!t || t.dtype() != DType::f64, "[", op, "] f64 runs on the CPU alone, this is ",
            name_of(ctx.device()));
}

Operand operand(const Tensor& t) {
  if (!t) return {};
  return {.data = t.raw(),
          .dtype = t.dtype(),
          .position_stride = t.stride(0),
          .head_stride = t.stride(1),
          .channel_stride = t.ndim() == 3 ? t.stride(2) : 1};
}

template <typename Args>
Problem make_problem(const Args& args, const Tensor& out) {
  const std::int64_t head_dim = args.q.size(2);
  const double default_scale = head_dim > 0 ? 1.0 / std::sqrt(static_cast<double>(head_dim)) : 1.0;
  return {.queries = args.q.size(0),
          .keys = args.k.size(0),
          .heads_kv = args.k.size(1),
          .group = args.k.size(1) > 0 ? args.q.size(1) / args.k.size(1) : 0,
          .head_dim = head_dim,
          .head_dim_v = args.v.size(2),
          .causal = args.causal,
          .scale = args.scale == 0.0 ? default_scale : args.scale,
          .q = operand(args.q),
          .k = operand(args.k),
          .v = operand(args.v),
          .out = operand(out),
          .logsumexp = operand(args.logsumexp)};
}

// Calls run(task, workspace) for all tasks, the last one first, with `floats` of workspace. Tasks differ in
// length where causal: workers take the next one as they finish.
template <typename Run>
void run_tasks(Context& ctx, std::int64_t tasks, std::int64_t floats, const Run& run) {
  const std::int64_t workers = std::min<std::int64_t>(ctx.threads(), tasks);
  const Tensor workspace = ctx.empty({workers, floats});
  std::atomic<std::int64_t> next{0};
  parallel_for(ctx, workers, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker)
      for (std::int64_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1))
        run(tasks - 1 - i, workspace.data<float>() + worker * floats);
  });
}

void run_simd(Context& ctx, const Problem& problem) {
  namespace kernels = attention_kernels;
  const Plan plan = kernels::make_plan(problem);
  const Tensor partials = ctx.empty({kernels::partial_floats(problem, plan)});
  run_tasks(ctx, plan.tasks(problem), kernels::workspace_floats(problem),
            [&](std::int64_t task, float* workspace) {
              kernels::run_task(problem, plan, task, workspace, partials.data<float>());
            });
  if (plan.splits == 1) return;
  parallel_for(ctx, problem.heads_kv * plan.row_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block)
      kernels::merge(problem, plan, block, partials.data<float>());
  });
}

void run_simd_backward(Context& ctx, const Problem& problem, const Gradients& gradients) {
  namespace kernels = attention_kernels;
  const BackwardPlan plan = kernels::make_backward_plan(problem);
  const Tensor sums = ctx.empty({kernels::backward_sum_floats(problem, plan, gradients)});
  run_tasks(ctx, plan.tasks(problem), kernels::backward_workspace_floats(problem),
            [&](std::int64_t task, float* workspace) {
              kernels::run_backward_task(problem, gradients, plan, task, workspace, sums.data<float>());
            });
  parallel_for(ctx, problem.heads_kv * plan.key_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block)
      kernels::finish_keys(problem, gradients, plan, block, sums.data<float>());
  });
}

}  // namespace

Tensor attention(Context& ctx, const AttentionArgs& args) {
  constexpr std::string_view kOp = "attention";
  validate_inputs(kOp, args);
  const Tensor& q = args.q;
  const Dims out_shape{q.size(0), q.size(1), args.v.size(2)};
  if (args.out) require_shape(kOp, "out", args.out, out_shape);
  if (args.logsumexp) require_logsumexp(kOp, args.logsumexp, q);
  require_on_device(
      ctx, kOp, {{"q", q}, {"k", args.k}, {"v", args.v}, {"out", args.out}, {"logsumexp", args.logsumexp}});
  const Tensor out = args.out ? args.out : ctx.empty(out_shape, q.dtype());
  const bool nothing = q.size(0) * q.size(1) == 0 || (out.numel() == 0 && !args.logsumexp);
  if constexpr (kWithCuda)
    if (ctx.on_gpu()) {
      require_gpu_path(ctx, kOp, args.path, {q, args.k, args.v, out, args.logsumexp});
      ctx.set_backend(kOp, "cuda");
      if (!nothing) attention_kernels::gpu::forward(ctx, make_problem(args, out));
      return out;
    }
  const bool simd = use_simd(ctx, kOp, args.path, {q, args.k, args.v, out, args.logsumexp});
  ctx.set_backend(kOp, simd ? "simd" : "reference");
  if (nothing) return out;
  const Problem problem = make_problem(args, out);
  if (simd)
    run_simd(ctx, problem);
  else
    attention_kernels::reference(problem);
  return out;
}

void attention_backward(Context& ctx, const AttentionBackwardArgs& args) {
  constexpr std::string_view kOp = "attention_backward";
  validate_inputs(kOp, args);
  const Dims out_shape{args.q.size(0), args.q.size(1), args.v.size(2)};
  require_shape(kOp, "out", args.out, out_shape);
  require_logsumexp(kOp, args.logsumexp, args.q);
  require_shape(kOp, "dout", args.dout, out_shape);
  if (args.dq) require_shape(kOp, "dq", args.dq, args.q.shape());
  if (args.dk) require_shape(kOp, "dk", args.dk, args.k.shape());
  if (args.dv) require_shape(kOp, "dv", args.dv, args.v.shape());
  require_on_device(ctx, kOp,
                    {{"q", args.q},
                     {"k", args.k},
                     {"v", args.v},
                     {"out", args.out},
                     {"logsumexp", args.logsumexp},
                     {"dout", args.dout},
                     {"dq", args.dq},
                     {"dk", args.dk},
                     {"dv", args.dv}});
  const bool nothing = !args.dq && !args.dk && !args.dv;
  const Gradients gradients{
      .dout = operand(args.dout), .dq = operand(args.dq), .dk = operand(args.dk), .dv = operand(args.dv)};
  if constexpr (kWithCuda)
    if (ctx.on_gpu()) {
      require_gpu_path(
          ctx, kOp, args.path,
          {args.q, args.k, args.v, args.out, args.logsumexp, args.dout, args.dq, args.dk, args.dv});
      ctx.set_backend(kOp, "cuda");
      if (!nothing) attention_kernels::gpu::backward(ctx, make_problem(args, args.out), gradients);
      return;
    }
  const bool simd =
      use_simd(ctx, kOp, args.path,
               {args.q, args.k, args.v, args.out, args.logsumexp, args.dout, args.dq, args.dk, args.dv});
  ctx.set_backend(kOp, simd ? "simd" : "reference");
  if (nothing) return;
  const Problem problem = make_problem(args, args.out);
  if (simd)
    run_simd_backward(ctx, problem, gradients);
  else
    attention_kernels::reference_backward(problem, gradients);
}

}  // namespace krait
