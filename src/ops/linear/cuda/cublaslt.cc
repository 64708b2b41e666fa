// Products by cuBLASLt. It thinks in matrices stored by columns: what is stored by rows here is a transposed
// matrix there, so out^T (out, rows) = weight x^T is what it is asked for, with no copy of anything whose
// rows or columns lie without gaps.
#include <algorithm>
#include <array>
#include <bit>
#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/cuda/gpu.h"
#include "krait/core/error.h"
#include "ops/linear/cuda/cublaslt_library.h"
#include "ops/linear/kernels.h"

namespace krait::linear_detail {
namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;
// Larger sizes are cut: kernels count tiles in one dimension of a grid, and elements of a row in 32 bits.
constexpr std::int64_t kLargestSide = std::int64_t{1} << 22;
constexpr std::int64_t kLargestSum = std::int64_t{1} << 30;
// A prompt of every length is a shape of its own; what was planned for them is forgotten at this many.
constexpr std::size_t kMostPlans = 4096;
constexpr std::size_t kMostProposals = 16;

cudaDataType_t type_of(DType dtype) {
  return dtype == DType::bf16 ? CUDA_R_16BF : dtype == DType::f16 ? CUDA_R_16F : CUDA_R_32F;
}

// How a matrix lies in memory.
struct Layout {
  bool by_rows = true;
  std::int64_t stride = 1;  // from a row to the next, or from a column to the next

  auto operator<=>(const Layout&) const = default;
};

std::optional<Layout> layout_of(const Tensor& t) {
  const std::int64_t rows = t.size(0);
  const std::int64_t columns = t.size(1);
  const auto lines = [](std::int64_t count, std::int64_t length, std::int64_t stride,
                        std::int64_t step) -> std::optional<std::int64_t> {
    if (length != 1 && step != 1) return std::nullopt;
    if (count == 1) return length;
    return stride >= length ? std::optional(stride) : std::nullopt;
  };
  if (const auto stride = lines(rows, columns, t.stride(0), t.stride(1))) return Layout{true, *stride};
  if (const auto stride = lines(columns, rows, t.stride(1), t.stride(0))) return Layout{false, *stride};
  return std::nullopt;
}

struct Matrix {
  Tensor tensor;
  Layout layout;
};

Matrix matrix_of(Context& ctx, const Tensor& t) {
  if (const auto layout = layout_of(t)) return {t, *layout};
  const Tensor copy = ctx.clone(t);
  return {copy, *layout_of(copy)};
}

// Kernels that load 16 bytes at a time are chosen only where addresses allow it.
std::uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<std::uintptr_t>(address);
  return bits == 0 ? 256U
                   : static_cast<std::uint32_t>(std::min(256, 1 << std::min(8, std::countr_zero(bits))));
}

// All that an algorithm depends on.
struct Shape {
  std::int64_t rows = 0;
  std::int64_t in = 0;
  std::int64_t out = 0;
  Layout x;
  Layout weight;
  std::int64_t out_stride = 0;
  DType dtype = DType::f32;      // of x and weight
  DType out_dtype = DType::f32;  // of out and bias
  bool bias = false;
  std::uint32_t alignment[4] = {};  // of weight, x, out and what is added to it, and bias

  auto operator<=>(const Shape&) const = default;
};

// Descriptors and the algorithm for a shape.
struct Plan {
  std::shared_ptr<cublasLtMatmulDescOpaque_t> desc;
  std::shared_ptr<cublasLtMatrixLayoutOpaque_t> weight;
  std::shared_ptr<cublasLtMatrixLayoutOpaque_t> x;
  std::shared_ptr<cublasLtMatrixLayoutOpaque_t> out;
  cublasLtMatmulAlgo_t algorithm{};
  std::size_t workspace = 0;
  std::string name;     // "linear cublaslt 8192 x 3352 by 768, bf16 to f32": rows, out, in
  bool served = false;  // cuBLASLt has a kernel for it
};

// What a Context keeps: the library, its handle, and a plan for each shape.
class Products {
 public:
  explicit Products(const cuda::DeviceLimits& limits)
      : library_(load_cublaslt()),
        multiprocessors_(limits.multiprocessors),
        compute_capability_(limits.compute_capability) {
    cublasLtHandle_t handle = nullptr;
    check(library_, library_.create(&handle), "a handle");
    handle_ = std::shared_ptr<cublasLtContext>(handle, library_.destroy);
  }

  const Plan& plan_of(const Shape& shape) {
    if (const auto at = plans_.find(shape); at != plans_.end()) return at->second;
    if (plans_.size() >= kMostPlans) plans_.clear();
    return plans_.emplace(shape, make_plan(shape)).first->second;
  }

  [[nodiscard]] const CublasLt& library() const { return library_; }
  [[nodiscard]] cublasLtHandle_t handle() const { return handle_.get(); }

 private:
  auto make_layout(cudaDataType_t type, std::int64_t rows, std::int64_t columns, std::int64_t stride) const {
    cublasLtMatrixLayout_t layout = nullptr;
    check(library_,
          library_.layout_create(&layout, type, static_cast<std::uint64_t>(rows),
                                 static_cast<std::uint64_t>(columns), stride),
          "a layout");
    return std::shared_ptr<cublasLtMatrixLayoutOpaque_t>(layout, library_.layout_destroy);
  }

  [[nodiscard]] Plan make_plan(const Shape& s) const {
    Plan plan;
    plan.name =
        concat("linear cublaslt ", s.rows, " x ", s.out, " by ", s.in, ", ", s.dtype, " to ", s.out_dtype);
    cublasLtMatmulDesc_t desc = nullptr;
    // f32 is multiplied as f32: none of the modes that round it to tf32 or bf16.
    check(library_, library_.desc_create(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product");
    plan.desc = std::shared_ptr<cublasLtMatmulDescOpaque_t>(desc, library_.desc_destroy);
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
      check(library_, library_.desc_set(desc, attribute, &value, sizeof(value)), "a product");
    };
    set(CUBLASLT_MATMUL_DESC_TRANSA, s.weight.by_rows ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, s.x.by_rows ? CUBLAS_OP_N : CUBLAS_OP_T);
    if (s.bias) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
      // The address stands for its alignment until a product is launched.
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, reinterpret_cast<const void*>(std::uintptr_t{s.alignment[3]}));
    }
    const cudaDataType_t type = type_of(s.dtype);
    plan.weight = s.weight.by_rows ? make_layout(type, s.in, s.out, s.weight.stride)
                                   : make_layout(type, s.out, s.in, s.weight.stride);
    plan.x = s.x.by_rows ? make_layout(type, s.in, s.rows, s.x.stride)
                         : make_layout(type, s.rows, s.in, s.x.stride);
    plan.out = make_layout(type_of(s.out_dtype), s.out, s.rows, s.out_stride);

    cublasLtMatmulPreference_t raw = nullptr;
    check(library_, library_.preference_create(&raw), "a preference");
    const std::shared_ptr<cublasLtMatmulPreferenceOpaque_t> preference(raw, library_.preference_destroy);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
      check(library_, library_.preference_set(raw, attribute, &value, sizeof(value)), "a preference");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::uint64_t{kWorkspaceBytes});
    // Sums that are divided among blocks meet in the workspace, as f32 and in a fixed order.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, std::uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s.alignment[0]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s.alignment[1]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s.alignment[2]);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s.alignment[2]);
    std::array<cublasLtMatmulHeuristicResult_t, kMostProposals> results{};
    int count = 0;
    const cublasStatus_t status =
        library_.heuristic(handle(), desc, plan.weight.get(), plan.x.get(), plan.out.get(), plan.out.get(),
                           raw, static_cast<int>(results.size()), results.data(), &count);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return plan;
    check(library_, status, "the choice of a kernel");
    std::vector<cublasLtMatmulHeuristicResult_t> kernels;
    for (int i = 0; i < count && results[i].state == CUBLAS_STATUS_SUCCESS; ++i)
      kernels.push_back(results[i]);
    plan.served = !kernels.empty();
    if (!plan.served) return plan;
    std::size_t best = 0;
    // Kernels that store a tile while they compute the next are Hopper's, for tensor cores. The model knows
    // products that fill the device.
    constexpr std::int64_t kLeastSide = 512;
    if (compute_capability_ == 90 && s.dtype != DType::f32 && std::min(s.rows, s.out) >= kLeastSide) {
      add_small_tiles(plan, s, kernels);
      std::vector<gpu::ProductProposal> proposals;
      for (const auto& kernel : kernels)
        proposals.push_back(
            {.waves = kernel.wavesCount, .splits = config_of(kernel.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM)});
      best = gpu::choose_proposal({.rows = s.rows, .in = s.in, .out = s.out, .out_dtype = s.out_dtype},
                                  proposals, multiprocessors_);
    }
    plan.algorithm = kernels[best].algo;
    plan.workspace = kernels[best].workspaceSize;
    return plan;
  }

  [[nodiscard]] int config_of(const cublasLtMatmulAlgo_t& algorithm,
                              cublasLtMatmulAlgoConfigAttributes_t attribute) const {
    int value = 0;
    std::size_t written = 0;
    check(library_, library_.config_get(&algorithm, attribute, &value, sizeof(value), &written),
          "the configuration of a kernel");
    return value;
  }

  // Adds kernels with small tiles that version 13.1 has, and proposes for some products, to those that it
  // proposes for this one.
  void add_small_tiles(const Plan& plan, const Shape& s,
                       std::vector<cublasLtMatmulHeuristicResult_t>& kernels) const {
    constexpr std::size_t kVersion = 1301;
    constexpr int kFamily = 66;  // its kernels for Hopper
    if (library_.version() / 100 != kVersion) return;
    cublasLtMatmulAlgo_t algorithm = kernels[0].algo;
    if (config_of(algorithm, CUBLASLT_ALGO_CONFIG_ID) != kFamily) return;
    // The check knows no addresses.
    if (std::min({s.alignment[0], s.alignment[1], s.alignment[2]}) < 16) return;
    struct Configuration {
      int tile;  // as cublasLtMatmulTile_t, whose names are not in the headers of all versions
      int option;
      std::uint16_t cluster;
    };
    for (const Configuration& c : {Configuration{29, 1, CUBLASLT_CLUSTER_SHAPE_2x1x1},      // 128 x 160
                                   Configuration{20, 1, CUBLASLT_CLUSTER_SHAPE_2x1x1},      // 128 x 128
                                   Configuration{201, 2, CUBLASLT_CLUSTER_SHAPE_1x2x1},     // 176 x 128
                                   Configuration{197, 2, CUBLASLT_CLUSTER_SHAPE_1x2x1},     // 168 x 128
                                   Configuration{184, 2, CUBLASLT_CLUSTER_SHAPE_1x2x1}}) {  // 144 x 128
      const auto set = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, const auto& value) {
        return library_.config_set(&algorithm, attribute, &value, sizeof(value)) == CUBLAS_STATUS_SUCCESS;
      };
      cublasLtMatmulHeuristicResult_t result{};
      if (set(CUBLASLT_ALGO_CONFIG_TILE_ID, c.tile) && set(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, c.option) &&
          set(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, c.cluster) && set(CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 1) &&
          set(CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, std::uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE}) &&
          library_.algorithm_check(handle(), plan.desc.get(), plan.weight.get(), plan.x.get(), plan.out.get(),
                                   plan.out.get(), &algorithm, &result) == CUBLAS_STATUS_SUCCESS &&
          result.state == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes) {
        result.algo = algorithm;
        kernels.push_back(result);
      }
    }
  }

  CublasLt library_;
  int multiprocessors_;
  int compute_capability_;
  std::shared_ptr<cublasLtContext> handle_;
  std::map<Shape, Plan> plans_;
};

Products& products_of(Context& ctx) {
  static const char key = 0;
  std::shared_ptr<void>& slot = ctx.attachment(&key);
  if (!slot) slot = std::make_shared<Products>(cuda::limits_of(ctx));
  return *static_cast<Products*>(slot.get());
}

// out (rows, out) stored by rows = addend + x weight^T + bias, all sizes within the limits. The addend,
// absent or stored as out is, may be out.
bool multiply(Context& ctx, const Matrix& x, const Matrix& weight, const Tensor& bias, const Matrix& out,
              const Tensor& addend) {
  Products& products = products_of(ctx);
  const Shape shape{.rows = out.tensor.size(0),
                    .in = weight.tensor.size(1),
                    .out = weight.tensor.size(0),
                    .x = x.layout,
                    .weight = weight.layout,
                    .out_stride = out.layout.stride,
                    .dtype = weight.tensor.dtype(),
                    .out_dtype = out.tensor.dtype(),
                    .bias = bias.defined(),
                    .alignment = {alignment_of(weight.tensor.raw()), alignment_of(x.tensor.raw()),
                                  std::min(alignment_of(out.tensor.raw()), alignment_of(addend.raw())),
                                  bias ? alignment_of(bias.raw()) : 0}};
  const Plan& plan = products.plan_of(shape);
  if (!plan.served) return false;
  const CublasLt& library = products.library();
  if (bias) {
    const void* address = bias.raw();
    check(library,
          library.desc_set(plan.desc.get(), CUBLASLT_MATMUL_DESC_BIAS_POINTER, &address, sizeof(address)),
          "the bias");
  }
  const Tensor workspace =
      plan.workspace > 0 ? ctx.empty({static_cast<std::int64_t>(plan.workspace)}, DType::u8) : Tensor();
  const float one = 1.0F;
  const float beta = addend ? 1.0F : 0.0F;
  const cuda::DeviceGuard guard(ctx.device().index);
  const cuda::KernelScope scope(ctx, plan.name);
  check(library,
        library.matmul(products.handle(), plan.desc.get(), &one, weight.tensor.raw(), plan.weight.get(),
                       x.tensor.raw(), plan.x.get(), &beta, addend ? addend.raw() : out.tensor.raw(),
                       plan.out.get(), out.tensor.raw(), plan.out.get(), &plan.algorithm,
                       workspace ? workspace.raw() : nullptr, plan.workspace, cuda::stream_of(ctx)),
        "a product");
  return true;
}

Matrix part(const Matrix& m, int dim, std::int64_t begin, std::int64_t end) {
  return {m.tensor.slice(dim, begin, end), m.layout};
}

// The same for any sizes, in parts. False where cuBLASLt had no kernel for some of them.
bool multiply_in_parts(Context& ctx, const Matrix& x, const Matrix& weight, const Tensor& bias,
                       const Matrix& out, const Tensor& addend) {
  const std::int64_t rows = x.tensor.size(0);
  const std::int64_t columns = weight.tensor.size(0);
  const std::int64_t in = weight.tensor.size(1);
  bool served = true;
  for (std::int64_t r = 0; r < rows; r += kLargestSide)
    for (std::int64_t c = 0; c < columns; c += kLargestSide)
      for (std::int64_t i = 0; i < in; i += kLargestSum) {
        const std::int64_t r_end = std::min(rows, r + kLargestSide);
        const std::int64_t c_end = std::min(columns, c + kLargestSide);
        const std::int64_t i_end = std::min(in, i + kLargestSum);
        const Matrix x_part = part(part(x, 0, r, r_end), 1, i, i_end);
        const Matrix weight_part = part(part(weight, 0, c, c_end), 1, i, i_end);
        const Matrix out_part = part(part(out, 0, r, r_end), 1, c, c_end);
        const Tensor bias_part = bias && i == 0 ? bias.slice(0, c, c_end) : Tensor();
        const Tensor added = i > 0    ? out_part.tensor
                             : addend ? addend.slice(0, r, r_end).slice(1, c, c_end)
                                      : Tensor();
        if (multiply(ctx, x_part, weight_part, bias_part, out_part, added)) continue;
        served = false;
        if (added && added.raw() != out_part.tensor.raw()) ctx.copy(added, out_part.tensor);
        gpu::plain(ctx, {.x = x_part.tensor,
                         .weight = weight_part.tensor,
                         .bias = bias_part,
                         .out = out_part.tensor,
                         .accumulate = added.defined()});
      }
  return served;
}

}  // namespace

bool gpu::cublaslt(Context& ctx, const Problem& p) {
  if (p.weight.size(1) == 0) {
    if (p.addend) ctx.copy(p.addend, p.out);
    plain(
        ctx,
        {.x = p.x, .weight = p.weight, .bias = p.bias, .out = p.out, .accumulate = p.accumulate || p.addend});
    return false;
  }
  const DType dtype = p.weight.dtype();
  const Tensor x = ctx.to(p.x, dtype);
  auto out_layout = layout_of(p.out);
  // A destination stored by columns is one by rows of the product with its factors exchanged.
  if (out_layout && !out_layout->by_rows && !p.bias && !p.addend &&
      (p.out.dtype() == DType::f32 || (p.out.dtype() == dtype && !p.accumulate)))
    return multiply_in_parts(ctx, matrix_of(ctx, p.weight), matrix_of(ctx, x), {},
                             {p.out.transpose(0, 1), {true, out_layout->stride}},
                             p.accumulate ? p.out.transpose(0, 1) : Tensor());

  // A 16-bit destination of another dtype than the factors goes through f32; so does one with a bias or with
  // what is there already, which cuBLASLt may add to what it has rounded. A result is rounded once.
  Tensor out = p.out;
  Tensor bias = p.bias ? ctx.contiguous(p.bias) : Tensor();
  const bool direct =
      out_layout && out_layout->by_rows &&
      (out.dtype() == DType::f32 || (out.dtype() == dtype && !bias && !p.accumulate && !p.addend));
  if (!direct) out = ctx.empty(p.out.shape(), DType::f32);
  Tensor addend = p.accumulate ? p.out : p.addend;
  // What is added is read by the strides of out.
  if (addend && (addend.dtype() != DType::f32 || addend.strides() != out.strides())) {
    ctx.copy(addend, out);
    addend = out;
  }
  if (bias) bias = ctx.to(bias, DType::f32);
  const bool served = multiply_in_parts(ctx, matrix_of(ctx, x), matrix_of(ctx, p.weight), bias,
                                        {out, *layout_of(out)}, addend);
  if (!direct) ctx.copy(out, p.out);
  return served;
}

}  // namespace krait::linear_detail
