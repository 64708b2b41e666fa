#include "krait/ops/optimizer.h"

#include <tvm/ffi/container/array.h>

#include <vector>

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

// One tensor for each parameter, in the same order in every list.
using Tensors = tvm::ffi::Array<tvm::ffi::Tensor>;

std::vector<Tensor> all_of(Operands& of, const char* name, const Tensors& tensors) {
  std::vector<Tensor> result;
  result.reserve(tensors.size());
  for (const tvm::ffi::Tensor& tensor : tensors) result.push_back(of(name, Given{tensor.GetDLTensorPtr()}));
  return result;
}

void require_count(const char* op, const char* name, std::size_t count, std::size_t expected) {
  require(count == expected, "[", op, "] ", name, " has ", count, " entries, expected ", expected,
          ": one for each parameter");
}

// `compute` is empty or None where no rounded copies are wanted.
void adamw(const Tensors& parameters, const Tensors& gradients, const Tensors& m, const Tensors& v,
           const tvm::ffi::Optional<Tensors>& compute, const tvm::ffi::Array<bool>& decay, std::int64_t step,
           double lr, double beta1, double beta2, double eps, double weight_decay, double gradient_scale) {
  constexpr const char* kOp = "adamw";
  Operands of(kOp);
  const std::size_t count = parameters.size();
  const std::vector<Tensor> values = all_of(of, "parameters", parameters);
  const std::vector<Tensor> slopes = all_of(of, "gradients", gradients);
  const std::vector<Tensor> first = all_of(of, "m", m);
  const std::vector<Tensor> second = all_of(of, "v", v);
  const std::vector<Tensor> rounded =
      compute.has_value() ? all_of(of, "compute", *compute) : std::vector<Tensor>();
  require_count(kOp, "gradients", slopes.size(), count);
  require_count(kOp, "m", first.size(), count);
  require_count(kOp, "v", second.size(), count);
  require_count(kOp, "decay", decay.size(), count);
  if (!rounded.empty()) require_count(kOp, "compute", rounded.size(), count);
  std::vector<AdamWTensor> tensors(count);
  for (std::size_t i = 0; i < count; ++i) {
    tensors[i] = {.parameter = values[i],
                  .gradient = slopes[i],
                  .m = first[i],
                  .v = second[i],
                  .compute = rounded.empty() ? Tensor() : rounded[i],
                  .decay = decay[static_cast<std::int64_t>(i)]};
  }
  const Lease ctx(of.device());
  krait::adamw(*ctx, {.tensors = tensors,
                      .step = step,
                      .lr = lr,
                      .beta1 = beta1,
                      .beta2 = beta2,
                      .eps = eps,
                      .weight_decay = weight_decay,
                      .gradient_scale = gradient_scale});
}

double global_norm(const Tensors& tensors) {
  Operands of("global_norm");
  const std::vector<Tensor> all = all_of(of, "tensors", tensors);
  const Lease ctx(of.device());
  return krait::global_norm(*ctx, all);
}

void update_average(const Tensors& averages, const Tensors& parameters, double decay) {
  Operands of("update_average");
  const std::vector<Tensor> to = all_of(of, "averages", averages);
  const std::vector<Tensor> from = all_of(of, "parameters", parameters);
  require_count("update_average", "averages", to.size(), from.size());
  std::vector<AveragedTensor> pairs;
  for (std::size_t i = 0; i < from.size(); ++i) pairs.push_back({to[i], from[i]});
  const Lease ctx(of.device());
  krait::update_average(*ctx, pairs, decay);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(adamw, krait::ffi::adamw)
KRAIT_FFI(global_norm, krait::ffi::global_norm)
KRAIT_FFI(update_average, krait::ffi::update_average)
