#include "krait/ops/activation.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <string_view>
#include <utility>

#include "core/build.h"
#include "core/convert.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "krait/core/error.h"
#include "ops/activation/kernels.h"
#include "ops/gpu_dtypes.h"
#include "ops/overlap.h"

namespace krait {
namespace {

// Tensors of one shape as rows of their last dimension.
Tensor as_rows(const Tensor& t) {
  if (t.ndim() == 0) return t.unsqueeze(0).unsqueeze(0);
  return t.ndim() == 1 ? t.unsqueeze(0) : t;
}

std::int64_t row_offset(const Tensor& t, std::int64_t row) {
  std::int64_t offset = 0;
  for (int d = t.ndim() - 2; d >= 0; --d) {
    offset += row % t.shape()[d] * t.strides()[d];
    row /= t.shape()[d];
  }
  return offset;
}

void load(const Tensor& t, std::int64_t offset, std::int64_t n, float* to) {
  activation::load_row(t.dtype(), t.raw(), offset, t.stride(-1), n, to);
}

void load(const Tensor& t, std::int64_t offset, std::int64_t n, double* to) {
  dispatch_float(t.dtype(), "input", [&](auto tag) {
    const auto* from = static_cast<const typename decltype(tag)::type*>(t.raw()) + offset;
    for (std::int64_t i = 0; i < n; ++i) to[i] = convert<double>(from[i * t.stride(-1)]);
  });
}

void store(const float* from, std::int64_t n, const Tensor& t, std::int64_t offset) {
  activation::store_row(from, t.dtype(), t.raw(), offset, t.stride(-1), n);
}

void store(const double* from, std::int64_t n, const Tensor& t, std::int64_t offset) {
  dispatch_float(t.dtype(), "output", [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* to = static_cast<T*>(t.raw()) + offset;
    for (std::int64_t i = 0; i < n; ++i) to[i * t.stride(-1)] = convert<T>(from[i]);
  });
}

// What an operator reads and writes, all of one shape. Outputs may be absent.
template <std::size_t kIn, std::size_t kOut>
struct Operands {
  std::array<Tensor, kIn> in;
  std::array<Tensor, kOut> out;
};

// Where a row of each operand starts.
template <std::size_t kIn, std::size_t kOut>
struct Offsets {
  std::array<std::int64_t, kIn> in;
  std::array<std::int64_t, kOut> out;
};

// Pieces of rows that stay in the first-level cache.
constexpr std::int64_t kPiece = 512;

// body(inputs, outputs, n) on pieces of a row in buffers of S: f32 for the kernels, f64 for the reference.
// All inputs of a piece are read before its outputs are written.
template <typename S, std::size_t kIn, std::size_t kOut, typename Body>
void staged_row(const Operands<kIn, kOut>& operands, const Offsets<kIn, kOut>& offsets, const Body& body) {
  S buffers[kIn + kOut][kPiece];
  std::array<const S*, kIn> inputs;
  std::array<S*, kOut> outputs;
  for (std::size_t i = 0; i < kIn; ++i) inputs[i] = buffers[i];
  for (std::size_t i = 0; i < kOut; ++i) outputs[i] = buffers[kIn + i];
  const std::int64_t n = operands.in[0].size(-1);
  for (std::int64_t at = 0; at < n; at += kPiece) {
    const std::int64_t m = std::min(kPiece, n - at);
    for (std::size_t i = 0; i < kIn; ++i)
      load(operands.in[i], offsets.in[i] + at * operands.in[i].stride(-1), m, buffers[i]);
    body(inputs, outputs, m);
    for (std::size_t i = 0; i < kOut; ++i)
      if (operands.out[i])
        store(outputs[i], m, operands.out[i], offsets.out[i] + at * operands.out[i].stride(-1));
  }
}

// Calls body(offsets) for each row, spread over the threads.
template <std::size_t kIn, std::size_t kOut, typename Body>
void for_rows(const Context& ctx, const Operands<kIn, kOut>& operands, const Body& body) {
  const std::int64_t n = operands.in[0].size(-1);
  const std::int64_t rows = operands.in[0].numel() / n;
  parallel_for(ctx, rows, std::max<std::int64_t>(1, 16384 / n), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      Offsets<kIn, kOut> offsets{};
      for (std::size_t i = 0; i < kIn; ++i) offsets.in[i] = row_offset(operands.in[i], r);
      for (std::size_t i = 0; i < kOut; ++i)
        if (operands.out[i]) offsets.out[i] = row_offset(operands.out[i], r);
      body(offsets);
    }
  });
}

// kernel(inputs, outputs, n) on rows of f32; element(values) -> values on f64.
template <std::size_t kIn, std::size_t kOut, typename Kernel, typename Element>
void run(Context& ctx, std::string_view op, ActivationPath path, Operands<kIn, kOut> operands,
         const Kernel& kernel, const Element& element) {
  bool wide = false;
  const auto look_at = [&wide](Tensor& t) {
    if (!t) return;
    wide = wide || t.dtype() == DType::f64;
    t = as_rows(t);
  };
  for (Tensor& t : operands.in) look_at(t);
  for (Tensor& t : operands.out) look_at(t);
  if (path == ActivationPath::simd)
    require(!wide, "[", op, "] the simd path has no f64, expected f32, bf16 or f16");
  const bool simd =
      path == ActivationPath::simd || (path == ActivationPath::automatic && !ctx.reference() && !wide);
  ctx.set_backend(op, simd ? "simd" : "reference");
  const std::int64_t n = operands.in[0].size(-1);
  if (operands.in[0].numel() == 0) return;

  if (!simd) {
    for_rows(ctx, operands, [&](const Offsets<kIn, kOut>& offsets) {
      staged_row<double>(operands, offsets, [&](const auto& in, const auto& out, std::int64_t m) {
        for (std::int64_t i = 0; i < m; ++i) {
          std::array<double, kIn> values;
          for (std::size_t j = 0; j < kIn; ++j) values[j] = in[j][i];
          const std::array<double, kOut> results = element(values);
          for (std::size_t j = 0; j < kOut; ++j) out[j][i] = results[j];
        }
      });
    });
    return;
  }
  // Rows of f32 side by side need no buffers.
  const auto direct = [n](const Tensor& t) {
    return t && t.dtype() == DType::f32 && (t.stride(-1) == 1 || n == 1);
  };
  if (std::all_of(operands.in.begin(), operands.in.end(), direct) &&
      std::all_of(operands.out.begin(), operands.out.end(), direct)) {
    for_rows(ctx, operands, [&](const Offsets<kIn, kOut>& offsets) {
      std::array<const float*, kIn> in;
      std::array<float*, kOut> out;
      for (std::size_t i = 0; i < kIn; ++i)
        in[i] = static_cast<const float*>(operands.in[i].raw()) + offsets.in[i];
      for (std::size_t i = 0; i < kOut; ++i)
        out[i] = static_cast<float*>(operands.out[i].raw()) + offsets.out[i];
      kernel(in, out, n);
    });
  } else {
    for_rows(ctx, operands,
             [&](const Offsets<kIn, kOut>& offsets) { staged_row<float>(operands, offsets, kernel); });
  }
}

void require_float(std::string_view op, std::string_view name, const Tensor& t) {
  require(is_float(t.dtype()), "[", op, "] ", name, " has dtype ", t.dtype(),
          ", expected f32, f64, bf16 or f16");
}

void require_x(std::string_view op, const Tensor& x) {
  require(x.defined(), "[", op, "] x is missing");
  require_float(op, "x", x);
}

void require_like_x(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x) {
  require(t.defined(), "[", op, "] ", name, " is missing");
  require(t.shape() == x.shape(), "[", op, "] ", name, " has shape ", t.shape(), ", expected ", x.shape());
  require_float(op, name, t);
}

Tensor checked_out(Context& ctx, std::string_view op, const Tensor& x, const Tensor& out) {
  if (!out) return ctx.empty(x.shape(), x.dtype());
  require_like_x(op, "out", out, x);
  return out;
}

// True where the operator runs on a GPU, which takes these tensors.
bool runs_on_gpu(Context& ctx, std::string_view op, ActivationPath path,
                 std::initializer_list<NamedTensor> tensors) {
  require_on_device(ctx, op, tensors);
  if (!ctx.on_gpu()) return false;
  require(path == ActivationPath::automatic, "[", op,
          "] path is one of the CPU's, expected automatic on a GPU");
  require_gpu_floats(op, tensors);
  ctx.set_backend(op, "cuda");
  return true;
}

using Two = std::array<double, 2>;
using Three = std::array<double, 3>;

}  // namespace

Tensor gated_silu(Context& ctx, const GatedSiluArgs& args) {
  constexpr std::string_view op = "gated_silu";
  require_x(op, args.x);
  require_like_x(op, "gate", args.gate, args.x);
  const Tensor out = checked_out(ctx, op, args.x, args.out);
  const bool gpu = runs_on_gpu(ctx, op, args.path, {{"x", args.x}, {"gate", args.gate}, {"out", out}});
  if constexpr (kWithCuda) {
    if (gpu) {
      activation::cuda_gated_silu(ctx, args.x, args.gate, out);
      return out;
    }
  }
  run(
      ctx, op, args.path, Operands<2, 1>{{args.x, args.gate}, {out}},
      [](const auto& in, const auto& to, std::int64_t n) {
        activation::gated_silu_row(in[0], in[1], to[0], n);
      },
      [](const Two& in) { return std::array{activation::gated_silu_reference(in[0], in[1])}; });
  return out;
}

Tensor gelu(Context& ctx, const GeluArgs& args) {
  constexpr std::string_view op = "gelu";
  require_x(op, args.x);
  const Tensor out = checked_out(ctx, op, args.x, args.out);
  const bool gpu = runs_on_gpu(ctx, op, args.path, {{"x", args.x}, {"out", out}});
  if constexpr (kWithCuda) {
    if (gpu) {
      activation::cuda_gelu(ctx, args.x, out, args.kind);
      return out;
    }
  }
  const GeluKind kind = args.kind;
  run(
      ctx, op, args.path, Operands<1, 1>{{args.x}, {out}},
      [kind](const auto& in, const auto& to, std::int64_t n) { activation::gelu_row(in[0], to[0], n, kind); },
      [kind](const std::array<double, 1>& in) {
        return std::array{activation::gelu_reference(in[0], kind)};
      });
  return out;
}

void gated_silu_backward(Context& ctx, const GatedSiluBackwardArgs& args) {
  constexpr std::string_view op = "gated_silu_backward";
  require_x(op, args.x);
  require_like_x(op, "gate", args.gate, args.x);
  require_like_x(op, "dout", args.dout, args.x);
  for (const auto& [name, t] : {std::pair{"dx", &args.dx}, std::pair{"dgate", &args.dgate}}) {
    if (!*t) continue;
    require_like_x(op, name, *t, args.x);
    require_apart(op, name, *t, "x", args.x, true);
    require_apart(op, name, *t, "gate", args.gate, true);
    require_apart(op, name, *t, "dout", args.dout, true);
  }
  require_apart(op, "dx", args.dx, "dgate", args.dgate);
  if (!args.dx && !args.dgate) return;
  const bool gpu = runs_on_gpu(
      ctx, op, args.path,
      {{"x", args.x}, {"gate", args.gate}, {"dout", args.dout}, {"dx", args.dx}, {"dgate", args.dgate}});
  if constexpr (kWithCuda)
    if (gpu) return activation::cuda_gated_silu_backward(ctx, args);
  run(
      ctx, op, args.path, Operands<3, 2>{{args.x, args.gate, args.dout}, {args.dx, args.dgate}},
      [](const auto& in, const auto& to, std::int64_t n) {
        activation::gated_silu_backward_row(in[0], in[1], in[2], to[0], to[1], n);
      },
      [](const Three& in) {
        const auto gradient = activation::gated_silu_backward_reference(in[0], in[1], in[2]);
        return Two{gradient.dx, gradient.dgate};
      });
}

void gelu_backward(Context& ctx, const GeluBackwardArgs& args) {
  constexpr std::string_view op = "gelu_backward";
  require_x(op, args.x);
  require_like_x(op, "dout", args.dout, args.x);
  require_like_x(op, "dx", args.dx, args.x);
  require_apart(op, "dx", args.dx, "x", args.x, true);
  require_apart(op, "dx", args.dx, "dout", args.dout, true);
  const bool gpu = runs_on_gpu(ctx, op, args.path, {{"x", args.x}, {"dout", args.dout}, {"dx", args.dx}});
  if constexpr (kWithCuda)
    if (gpu) return activation::cuda_gelu_backward(ctx, args);
  const GeluKind kind = args.kind;
  run(
      ctx, op, args.path, Operands<2, 1>{{args.x, args.dout}, {args.dx}},
      [kind](const auto& in, const auto& to, std::int64_t n) {
        activation::gelu_backward_row(in[0], in[1], to[0], n, kind);
      },
      [kind](const Two& in) { return std::array{activation::gelu_backward_reference(in[0], in[1], kind)}; });
}

}  // namespace krait
