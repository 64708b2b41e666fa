#include "krait/ops/selective_scan.h"

#include <algorithm>
#include <array>
#include <span>
#include <string_view>
#include <utility>

#include "core/build.h"
#include "krait/core/error.h"
#include "ops/selective_scan/scan.h"
#include "ops/token_runs.h"

namespace krait {
namespace scan {
namespace {

bool is_complex(DType dtype) { return dtype == DType::c64 || dtype == DType::c128; }
bool is_double(DType dtype) { return dtype == DType::f64 || dtype == DType::c128; }

using Named = std::pair<std::string_view, const Tensor*>;

void check_device(std::string_view name, const Tensor& tensor, Device device) {
  require(!tensor || tensor.device() == device, "[selective_scan] ", name, " is on device ",
          name_of(tensor.device()), ", expected ", name_of(device));
}

void check_shape(std::string_view name, const Tensor& tensor, const Dims& expected, std::string_view why) {
  require(tensor.shape() == expected, "[selective_scan] ", name, " has shape ", tensor.shape(), ", expected ",
          expected, ": ", why);
}

void check_float(std::string_view name, const Tensor& tensor) {
  require(is_float(tensor.dtype()), "[selective_scan] ", name, " has dtype ", tensor.dtype(),
          ", expected f32, bf16, f16 or f64");
}

// Constant (D, N), or variable with L tokens (2L numbers where A is complex) in four dimensions.
Tensor check_factor(std::string_view name, const Tensor& factor, const SelectiveScanArgs& args,
                    bool complex) {
  const std::int64_t channels = args.u.size(1);
  const std::int64_t d_state = args.A.size(1);
  require(factor.defined(), "[selective_scan] ", name, " is absent");
  if (factor.ndim() == 2) {
    check_shape(name, factor, {channels, d_state}, "(D, N) for a constant one");
    require(complex ? is_complex(factor.dtype()) : is_float(factor.dtype()), "[selective_scan] ", name,
            " has dtype ", factor.dtype(), ", expected ", complex ? "c64 or c128" : "f32, bf16, f16 or f64",
            ", as A has dtype ", args.A.dtype());
    return factor;
  }
  require(factor.ndim() == 3 || factor.ndim() == 4, "[selective_scan] ", name, " has shape ", factor.shape(),
          ", expected (D, N), (B, N, L) or (B, G, N, L)");
  check_float(name, factor);
  const Tensor variable = factor.ndim() == 3 ? factor.unsqueeze(1) : factor;
  const std::int64_t groups = variable.size(1);
  const std::int64_t numbers = (complex ? 2 : 1) * args.u.size(2);
  check_shape(name, variable, {args.u.size(0), groups, d_state, numbers},
              complex ? "(B, G, N, 2L), real and imaginary parts interleaved" : "(B, G, N, L)");
  require(groups > 0 && channels % groups == 0, "[selective_scan] ", name, " has ", groups,
          " groups, which do not divide the ", channels, " channels");
  return variable;
}

// The common number of groups; a factor of one group serves any number.
std::int64_t align_groups(Tensor& B, Tensor& C) {
  const std::int64_t of_b = B.ndim() == 4 ? B.size(1) : 1;
  const std::int64_t of_c = C.ndim() == 4 ? C.size(1) : 1;
  require(of_b == of_c || of_b == 1 || of_c == 1, "[selective_scan] B has ", of_b, " groups and C has ", of_c,
          ", expected the same number");
  const std::int64_t groups = std::max(of_b, of_c);
  const auto widen = [groups](Tensor& factor) {
    if (factor.ndim() == 4) factor = factor.expand({factor.size(0), groups, factor.size(2), factor.size(3)});
  };
  widen(B);
  widen(C);
  return groups;
}

std::vector<Row> rows_of(const SelectiveScanArgs& args) {
  std::vector<Row> rows;
  if (args.cu_seqlens) {
    for (std::int64_t i = 0; i + 1 < args.cu_seqlens.size(0); ++i) {
      const std::int64_t begin = index_at(args.cu_seqlens, i);
      rows.push_back(
          {.batch = 0, .begin = begin, .length = index_at(args.cu_seqlens, i + 1) - begin, .state = i});
    }
  } else {
    for (std::int64_t b = 0; b < args.u.size(0); ++b)
      rows.push_back({.batch = b, .length = args.u.size(2), .state = b});
  }
  return rows;
}

std::vector<Save> saves_of(const SelectiveScanArgs& args, const std::vector<Row>& rows) {
  std::vector<Save> saves;
  if (!args.state_positions) return saves;
  for (std::int64_t b = 0; b < args.state_positions.size(0); ++b) {
    const Tensor positions = args.state_positions.select(0, b);
    for (std::int64_t m = 0; m < positions.size(0); ++m) {
      const std::int64_t t = index_at(positions, m);
      // Rows are ordered by batch and begin: the last one that does not begin after t holds it.
      const auto after = [](const std::pair<std::int64_t, std::int64_t>& at, const Row& row) {
        return at < std::pair(row.batch, row.begin);
      };
      const auto row = std::upper_bound(rows.begin(), rows.end(), std::pair(b, t), after) - 1;
      const std::int64_t offset = t - row->begin;
      saves.push_back(
          {.row = row - rows.begin(), .step = args.reverse ? row->length - 1 - offset : offset, .slot = m});
    }
  }
  std::sort(saves.begin(), saves.end(),
            [](const Save& a, const Save& b) { return std::pair(a.row, a.step) < std::pair(b.row, b.step); });
  return saves;
}

Dims state_shape(const Problem& p) { return {std::ssize(p.rows), p.channels, p.d_state}; }

std::string_view meaning_of_states(const SelectiveScanArgs& args) {
  return args.cu_seqlens ? "one state per packed sequence" : "one state per row";
}

void check_state_dtype(std::string_view name, const Tensor& state, const Problem& p) {
  require(p.complex ? is_complex(state.dtype()) : is_float(state.dtype()), "[selective_scan] ", name,
          " has dtype ", state.dtype(), ", expected ", p.complex ? "c64 or c128" : "f32, bf16, f16 or f64",
          ", as A has dtype ", p.A.dtype());
}

// Uninitialised, dense, with the dimensions in memory in the order that `like` has them.
Tensor empty_like(Context& ctx, const Tensor& like) {
  std::array<int, 3> order = {0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return like.stride(a) > like.stride(b); });
  Dims strides = {0, 0, 0};
  std::int64_t step = 1;
  for (int i = 2; i >= 0; --i) {
    const int dim = order[static_cast<std::size_t>(i)];
    strides[dim] = step;
    step *= std::max<std::int64_t>(like.size(dim), 1);
  }
  return ctx.empty(like.shape(), like.dtype()).as_strided(like.shape(), strides, 0);
}

Tensor destination(Context& ctx, std::string_view name, const Tensor& given, const Dims& shape, DType dtype,
                   std::string_view meaning) {
  if (!given) return ctx.empty(shape, dtype);
  check_shape(name, given, shape, meaning);
  require(given.dtype() == dtype, "[selective_scan] ", name, " has dtype ", given.dtype(), ", expected ",
          dtype);
  return given;
}

std::array<Named, 16> named(const SelectiveScanArgs& args) {
  return {{{"u", &args.u},
           {"delta", &args.delta},
           {"A", &args.A},
           {"B", &args.B},
           {"C", &args.C},
           {"D", &args.D},
           {"z", &args.z},
           {"delta_bias", &args.delta_bias},
           {"initial_state", &args.initial_state},
           {"seq_idx", &args.seq_idx},
           {"cu_seqlens", &args.cu_seqlens},
           {"state_positions", &args.state_positions},
           {"out", &args.out},
           {"last_state", &args.last_state},
           {"states", &args.states},
           {"checkpoints", &args.checkpoints}}};
}

// The inputs, without destinations.
Problem validated(const SelectiveScanArgs& args, Device device) {
  require(args.u.defined(), "[selective_scan] u is absent");
  require(args.delta.defined(), "[selective_scan] delta is absent");
  require(args.A.defined(), "[selective_scan] A is absent");
  const std::array<Named, 16> tensors = named(args);
  const bool on_gpu = device.kind != Device::Kind::cpu;
  for (const auto& [name, tensor] : tensors) {
    // Those of sequences have been brought to the host.
    const bool index =
        tensor == &args.seq_idx || tensor == &args.cu_seqlens || tensor == &args.state_positions;
    if (!on_gpu || !index) check_device(name, *tensor, device);
    require(!on_gpu || !*tensor || !is_double(tensor->dtype()), "[selective_scan] ", name, " has dtype ",
            tensor->dtype(), ", expected f32, bf16, f16 or c64: a GPU computes in f32");
  }

  require(args.u.ndim() == 3, "[selective_scan] u has shape ", args.u.shape(), ", expected (B, D, L)");
  check_float("u", args.u);
  const std::int64_t batch = args.u.size(0);
  const std::int64_t channels = args.u.size(1);
  const std::int64_t length = args.u.size(2);
  check_float("delta", args.delta);
  check_shape("delta", args.delta, args.u.shape(), "as u");
  require(args.A.ndim() == 2 && args.A.size(0) == channels, "[selective_scan] A has shape ", args.A.shape(),
          ", expected (", channels, ", N): one row per channel");
  require(args.A.dtype() == DType::f32 || args.A.dtype() == DType::f64 || is_complex(args.A.dtype()),
          "[selective_scan] A has dtype ", args.A.dtype(), ", expected f32, f64, c64 or c128");

  Problem p;
  p.complex = is_complex(args.A.dtype());
  p.channels = channels;
  p.d_state = args.A.size(1);
  p.u = args.u;
  p.delta = args.delta;
  p.A = args.A;
  p.B = check_factor("B", args.B, args, p.complex);
  p.C = check_factor("C", args.C, args, p.complex);
  p.groups = align_groups(p.B, p.C);
  if (args.D) {
    check_float("D", args.D);
    check_shape("D", args.D, {channels}, "one value per channel");
  }
  if (args.z) {
    check_float("z", args.z);
    check_shape("z", args.z, args.u.shape(), "as u");
  }
  if (args.delta_bias) {
    check_float("delta_bias", args.delta_bias);
    check_shape("delta_bias", args.delta_bias, {channels}, "one value per channel");
  }
  p.D = args.D;
  p.z = args.z;
  p.delta_bias = args.delta_bias;
  require(!args.seq_idx || !args.cu_seqlens,
          "[selective_scan] seq_idx and cu_seqlens are both given, expected one of them");
  validate_sequences("selective_scan", batch, length, args.seq_idx, args.cu_seqlens, args.state_positions);
  p.seq_idx = args.seq_idx;
  p.whole_rows = !args.seq_idx && !args.cu_seqlens;
  if (on_gpu)
    p.runs = cut_into_runs(batch, length, args.seq_idx, args.cu_seqlens, args.state_positions, args.reverse);
  p.rows = rows_of(args);
  p.saves = saves_of(args, p.rows);
  p.delta_softplus = args.delta_softplus;
  p.reverse = args.reverse;

  if (args.initial_state) {
    check_shape("initial_state", args.initial_state, state_shape(p), meaning_of_states(args));
    check_state_dtype("initial_state", args.initial_state, p);
  }
  p.initial_state = args.initial_state;

  const bool in_double = std::any_of(tensors.begin(), tensors.end(), [](const auto& named) {
    return named.second->defined() && is_double(named.second->dtype());
  });
  // The dtype of A tells the paths the precision of the whole computation.
  if (in_double) p.A = p.A.to(p.complex ? DType::c128 : DType::f64);
  return p;
}

// How many checkpoints the tiles of all rows have.
std::int64_t count_tile_checkpoints(const std::vector<std::vector<Tile>>& rows) {
  std::int64_t count = 0;
  for (const std::vector<Tile>& tiles : rows)
    count += std::count_if(tiles.begin(), tiles.end(), [](const Tile& tile) { return tile.checkpoint >= 0; });
  return count;
}

// Where `count` checkpoints go, (K, N, D).
Tensor checkpoints_destination(Context& ctx, const SelectiveScanArgs& args, const Problem& p,
                               std::int64_t count) {
  if (!args.checkpoints) return ctx.empty({count, p.d_state, p.channels}, p.A.dtype());
  const Dims most = selective_scan_checkpoints_shape(args.u.shape(), p.d_state, p.complex, ctx.device().kind);
  return destination(ctx, "checkpoints", args.checkpoints, most, p.A.dtype(),
                     "selective_scan_checkpoints_shape");
}

// The states that the backward wants.
void add_checkpoints(Context& ctx, const SelectiveScanArgs& args, Problem& p) {
  const auto rows = cut_into_tiles(p, choose_backward_steps(p.d_state, p.complex));
  for (std::int64_t r = 0; r < std::ssize(rows); ++r)
    for (const Tile& tile : rows[static_cast<std::size_t>(r)])
      if (tile.checkpoint >= 0)
        p.saves.push_back({.row = r, .step = tile.begin - 1, .slot = tile.checkpoint, .checkpoint = true});
  std::sort(p.saves.begin(), p.saves.end(),
            [](const Save& a, const Save& b) { return std::pair(a.row, a.step) < std::pair(b.row, b.step); });
  p.checkpoints = checkpoints_destination(ctx, args, p, count_tile_checkpoints(rows)).transpose(1, 2);
}

void add_destinations(Context& ctx, const SelectiveScanArgs& args, Problem& p) {
  p.out = args.out ? destination(ctx, "out", args.out, args.u.shape(), args.u.dtype(), "as u")
                   : empty_like(ctx, args.u);
  if (args.last_state || args.return_last_state)
    p.last_state =
        destination(ctx, "last_state", args.last_state, state_shape(p), p.A.dtype(), meaning_of_states(args));
  require(!args.states || args.state_positions,
          "[selective_scan] states is given without state_positions, expected both");
  if (args.state_positions)
    p.states = destination(ctx, "states", args.states,
                           {args.u.size(0), args.state_positions.size(1), p.channels, p.d_state}, p.A.dtype(),
                           "one state per position");
}

// All tensors of the backward beside those of the forward.
std::array<Named, 12> named(const SelectiveScanBackwardArgs& args) {
  return {{{"dout", &args.dout},
           {"dlast_state", &args.dlast_state},
           {"du", &args.du},
           {"ddelta", &args.ddelta},
           {"dz", &args.dz},
           {"dinitial_state", &args.dinitial_state},
           {"dB", &args.dB},
           {"dC", &args.dC},
           {"dA", &args.dA},
           {"dD", &args.dD},
           {"ddelta_bias", &args.ddelta_bias},
           {"checkpoints", &args.checkpoints}}};
}

// The gradient of B or C, in four dimensions where the factor is variable.
Tensor check_factor_gradient(std::string_view name, const Tensor& gradient, const Tensor& factor,
                             const Problem& p) {
  if (!gradient) return gradient;
  check_shape(name, gradient, factor.shape(), name == "dB" ? "as B" : "as C");
  if (factor.ndim() == 2)
    check_state_dtype(name, gradient, p);
  else
    check_float(name, gradient);
  return gradient.ndim() == 3 ? gradient.unsqueeze(1) : gradient;
}

// No destination may start where another tensor does. (Others may lie between its elements: views of one
// matrix.)
void check_apart(const SelectiveScanBackwardArgs& args) {
  const std::array<Named, 12> outer = named(args);
  const std::array<Named, 16> all = named(args.forward);
  const auto inner = std::span(all).first(11);  // the inputs
  const auto check = [&](const Named& destination, const Named& other) {
    const auto& [name, tensor] = destination;
    if (!*tensor || !*other.second || tensor->numel() == 0 || other.second->numel() == 0) return;
    require(tensor->raw() != other.second->raw(), "[selective_scan] ", name, " shares memory with ",
            other.first);
  };
  for (const Named& destination : std::span(outer).subspan(2, 9)) {
    for (const Named& input : inner) check(destination, input);
    for (const Named& other : outer) {
      const bool same_state = destination.first == "dinitial_state" && other.first == "dlast_state";
      if (&other != &destination && !same_state) check(destination, other);
    }
  }
}

Gradients validated(const SelectiveScanBackwardArgs& args, const Problem& p, Device device) {
  const SelectiveScanArgs& forward = args.forward;
  require(args.dout.defined(), "[selective_scan] dout is absent");
  const std::array<Named, 12> tensors = named(args);
  for (const auto& [name, tensor] : tensors) check_device(name, *tensor, device);
  for (const auto& [name, tensor] : {tensors[0], tensors[2], tensors[3], tensors[4]}) {
    if (!*tensor) continue;
    check_float(name, *tensor);
    check_shape(name, *tensor, forward.u.shape(), "as u");
  }
  for (const auto& [name, tensor] : {tensors[1], tensors[5]}) {
    if (!*tensor) continue;
    check_shape(name, *tensor, state_shape(p), meaning_of_states(forward));
    check_state_dtype(name, *tensor, p);
  }
  if (args.dA) {
    check_shape("dA", args.dA, forward.A.shape(), "as A");
    require(p.complex ? is_complex(args.dA.dtype())
                      : args.dA.dtype() == DType::f32 || args.dA.dtype() == DType::f64,
            "[selective_scan] dA has dtype ", args.dA.dtype(), ", expected ",
            p.complex ? "c64 or c128" : "f32 or f64", ", as A has dtype ", forward.A.dtype());
  }
  for (const auto& [name, tensor] : {tensors[9], tensors[10]}) {
    if (!*tensor) continue;
    check_shape(name, *tensor, {p.channels}, "one value per channel");
    require(tensor->dtype() == DType::f32 || tensor->dtype() == DType::f64, "[selective_scan] ", name,
            " has dtype ", tensor->dtype(), ", expected f32 or f64");
  }
  if (args.checkpoints) {
    const std::int64_t count =
        device.kind != Device::Kind::cpu
            ? count_checkpoints(p.runs)
            : count_tile_checkpoints(cut_into_tiles(p, choose_backward_steps(p.d_state, p.complex)));
    const Dims most = selective_scan_checkpoints_shape(forward.u.shape(), p.d_state, p.complex, device.kind);
    if (args.checkpoints.shape() != most)
      check_shape("checkpoints", args.checkpoints, {count, p.d_state, p.channels},
                  "as selective_scan returned them for these arguments");
    require(args.checkpoints.dtype() == (p.complex ? DType::c64 : DType::f32),
            "[selective_scan] checkpoints has dtype ", args.checkpoints.dtype(), ", expected ",
            p.complex ? "c64" : "f32");
  }
  check_apart(args);
  require(!args.dz || forward.z, "[selective_scan] dz is given without z");
  require(!args.dD || forward.D, "[selective_scan] dD is given without D");
  require(!args.ddelta_bias || forward.delta_bias,
          "[selective_scan] ddelta_bias is given without delta_bias");
  return {.dout = args.dout,
          .dlast_state = args.dlast_state,
          .checkpoints = args.checkpoints ? args.checkpoints.transpose(1, 2) : Tensor(),
          .du = args.du,
          .ddelta = args.ddelta,
          .dz = args.dz,
          .dinitial_state = args.dinitial_state,
          .dB = check_factor_gradient("dB", args.dB, forward.B, p),
          .dC = check_factor_gradient("dC", args.dC, forward.C, p),
          .dA = args.dA,
          .dD = args.dD,
          .ddelta_bias = args.ddelta_bias};
}

// The arguments with index tensors of sequences on the host, where they are looked at.
SelectiveScanArgs on_host(const Context& ctx, SelectiveScanArgs args) {
  for (Tensor* t : {&args.seq_idx, &args.cu_seqlens, &args.state_positions})
    if (*t) *t = ctx.to_host(*t);
  return args;
}

void require_gpu_path(const Context& ctx, ScanPath path) {
  require(path == ScanPath::automatic && !ctx.reference(),
          "[selective_scan] a path of the CPU is asked for on ", name_of(ctx.device()),
          ", expected automatic");
}

[[maybe_unused]] SelectiveScanResult forward_on_gpu(Context& ctx, const SelectiveScanArgs& args) {
  require_gpu_path(ctx, args.path);
  Problem p = validated(on_host(ctx, args), ctx.device());
  add_destinations(ctx, args, p);
  // Kernels write them one after the other.
  require(args.checkpoints.is_contiguous(), "[selective_scan] checkpoints has strides ",
          args.checkpoints.strides(), ", expected contiguous ones");
  if (args.return_checkpoints || args.checkpoints)
    p.checkpoints = checkpoints_destination(ctx, args, p, count_checkpoints(p.runs));
  run_cuda(ctx, p);
  ctx.set_backend("selective_scan", "cuda");
  return {.out = p.out, .last_state = p.last_state, .states = p.states, .checkpoints = p.checkpoints};
}

[[maybe_unused]] void backward_on_gpu(Context& ctx, const SelectiveScanBackwardArgs& args) {
  require_gpu_path(ctx, args.forward.path);
  SelectiveScanArgs forward = on_host(ctx, args.forward);
  forward.out = forward.last_state = forward.state_positions = forward.states = forward.checkpoints = {};
  const Problem p = validated(forward, ctx.device());
  Gradients gradients = validated(args, p, ctx.device());
  gradients.checkpoints = args.checkpoints ? ctx.contiguous(args.checkpoints) : Tensor();
  for (const auto& [name, tensor] : named(args))
    require(!*tensor || !is_double(tensor->dtype()), "[selective_scan] ", name, " has dtype ",
            tensor->dtype(), ", expected f32, bf16, f16 or c64: a GPU computes in f32");
  run_cuda_backward(ctx, p, gradients);
  ctx.set_backend("selective_scan_backward", "cuda");
}

}  // namespace

}  // namespace scan

Dims selective_scan_checkpoints_shape(const Dims& u, std::int64_t d_state, bool complex,
                                      Device::Kind device) {
  require(u.size() == 3, "[selective_scan] u has shape ", u, ", expected (B, D, L)");
  const std::int64_t steps =
      device == Device::Kind::cpu ? scan::choose_backward_steps(d_state, complex) : scan::kCheckpointSteps;
  return {scan::count_most_checkpoints(u[0], u[2], steps), d_state, u[1]};
}

SelectiveScanResult selective_scan(Context& ctx, const SelectiveScanArgs& args) {
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) return scan::forward_on_gpu(ctx, args);
  }
  scan::Problem problem = scan::validated(args, ctx.device());
  scan::add_destinations(ctx, args, problem);
  const bool in_double = scan::is_double(problem.A.dtype());
  const ScanPath path = scan::choose_path(args.path, in_double, ctx.reference());
  if (path == ScanPath::reference) {
    require(!args.checkpoints, "[selective_scan] checkpoints is given, but the reference path keeps none");
    scan::run_reference(problem);
    ctx.set_backend("selective_scan", "reference");
  } else {
    require(!in_double, "[selective_scan] the path simd has no f64, expected f32, bf16 and f16 inputs");
    if (args.return_checkpoints || args.checkpoints) scan::add_checkpoints(ctx, args, problem);
    scan::run_simd(ctx, problem);
    ctx.set_backend("selective_scan", concat("simd (", simd_target(), ")"));
  }
  return {.out = problem.out,
          .last_state = problem.last_state,
          .states = problem.states,
          .checkpoints = problem.checkpoints ? problem.checkpoints.transpose(1, 2) : Tensor()};
}

void selective_scan_backward(Context& ctx, const SelectiveScanBackwardArgs& args) {
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) return scan::backward_on_gpu(ctx, args);
  }
  SelectiveScanArgs forward = args.forward;
  forward.out = forward.last_state = forward.state_positions = forward.states = forward.checkpoints = {};
  scan::Problem problem = scan::validated(forward, ctx.device());
  const scan::Gradients gradients = scan::validated(args, problem, ctx.device());
  const auto tensors = scan::named(args);
  const bool in_double = scan::is_double(problem.A.dtype()) ||
                         std::any_of(tensors.begin(), tensors.end(), [](const auto& named) {
                           return named.second->defined() && scan::is_double(named.second->dtype());
                         });
  if (in_double) problem.A = problem.A.to(problem.complex ? DType::c128 : DType::f64);
  const ScanPath path = scan::choose_path(forward.path, in_double, ctx.reference());
  if (path == ScanPath::reference) {
    scan::run_reference_backward(problem, gradients);
    ctx.set_backend("selective_scan_backward", "reference");
  } else {
    require(!in_double, "[selective_scan] the path simd has no f64, expected f32, bf16 and f16 tensors");
    scan::run_simd_backward(ctx, problem, gradients);
    ctx.set_backend("selective_scan_backward", concat("simd (", simd_target(), ")"));
  }
}

}  // namespace krait
