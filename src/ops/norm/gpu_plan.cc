// The choice of kernels on a GPU.
#include <initializer_list>

#include "ops/norm/kernels.h"

namespace krait::norm_kernels {
namespace {

constexpr std::int64_t kVector = 8;
constexpr int kLanes = 32;

// Channels side by side, one stride between rows, and every row on the boundary of a vector.
bool in_vectors(const Rows& rows) {
  if (!rows) return true;
  if (rows.channel_stride() != 1 || rows.sizes().size() > 1) return false;
  if (reinterpret_cast<std::uintptr_t>(rows.row(0)) % 16 != 0) return false;
  return rows.strides().empty() || rows.strides()[0] % 16 == 0;
}

bool all_in_vectors(std::initializer_list<const Rows*> operands) {
  for (const Rows* rows : operands)
    if (!in_vectors(*rows)) return false;
  return true;
}

bool all_of_dtype(DType dtype, std::initializer_list<const Rows*> operands) {
  for (const Rows* rows : operands)
    if (*rows && rows->dtype() != dtype) return false;
  return true;
}

// With so many vectors a thread; not for groups of another size than whole vectors.
GpuPlan plan_with(int vectors, std::int64_t group_size) {
  const std::int64_t warps = (group_size + kVector * kLanes * vectors - 1) / (kVector * kLanes * vectors);
  return {.vectors = vectors, .warps = static_cast<int>(warps), .groups = warps == 1 ? 4 : 1};
}

}  // namespace

GpuPlan choose_gpu_plan(std::int64_t group_size, int most_vectors) {
  if (group_size % kVector != 0 || group_size > kVector * kLanes * most_vectors * kMaxWarps) return {};
  // Few registers leave room for many warps, whose loads keep the memory busy: one vector or two, whichever
  // leaves fewer of them idle, and then fewer warps; more where two do not suffice.
  const GpuPlan one = plan_with(1, group_size);
  const GpuPlan two = plan_with(2, group_size);
  if (two.warps > kMaxWarps) return plan_with(4, group_size);
  return one.warps > kMaxWarps || one.warps >= 2 * two.warps ? two : one;
}

GpuPlan choose_gpu_plan(const Problem& p) {
  if (!all_in_vectors({&p.x, &p.residual, &p.z, &p.weight, &p.bias, &p.out, &p.residual_out})) return {};
  const DType dtype = p.out.dtype();
  if (!all_of_dtype(dtype, {&p.x, &p.z})) return {};
  if (!all_of_dtype(dtype, {&p.residual, &p.residual_out}) &&
      !all_of_dtype(DType::f32, {&p.residual, &p.residual_out}))
    return {};
  if (p.z && (p.residual || p.residual_out)) return {};
  return choose_gpu_plan(p.group_size, 4);
}

GpuPlan choose_gpu_plan(const BackwardProblem& p) {
  if (!all_in_vectors({&p.x, &p.z, &p.weight, &p.bias, &p.dout, &p.dresidual, &p.dx, &p.dx_rounded, &p.dz}))
    return {};
  const DType dtype = p.dout.dtype();
  if (!all_of_dtype(dtype, {&p.z, &p.dx_rounded, &p.dz})) return {};
  if (!all_of_dtype(dtype, {&p.x, &p.dresidual, &p.dx}) &&
      !all_of_dtype(DType::f32, {&p.x, &p.dresidual, &p.dx}))
    return {};
  if (p.z && (p.x.dtype() != dtype || p.dresidual || p.dbias || p.dx_rounded)) return {};
  return choose_gpu_plan(p.group_size, 2);
}

}  // namespace krait::norm_kernels
