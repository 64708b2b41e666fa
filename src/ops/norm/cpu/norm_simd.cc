// A row is read once into f32 in the first-level cache, reduced, scaled there and written once. Memory sees
// each element of each operand once.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/norm/cpu/norm_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "core/simd/math-inl.h"
#include "ops/norm/cpu/rows-inl.h"
#include "ops/norm/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace krait::norm_kernels::HWY_NAMESPACE {

namespace {

void rows(const Problem& p, std::int64_t begin, std::int64_t end, float* workspace) {
  const D d;
  const std::int64_t n = p.channels;
  float* r = workspace;
  float* other = workspace + padded(n);  // the residual, then silu(z)
  const auto* weight = p.weight ? static_cast<const float*>(p.weight.row(0)) : nullptr;
  const auto* bias = p.bias ? static_cast<const float*>(p.bias.row(0)) : nullptr;
  const auto multiply = [](V a, V b) { return hn::Mul(a, b); };
  for (std::int64_t row = begin; row < end; ++row) {
    read(p.x, row, n, r);
    if (p.residual) {
      read(p.residual, row, n, other);
      combine(r, other, n, [](V a, V b) { return hn::Add(a, b); });
    }
    if (p.z) {
      read(p.z, row, n, other);
      combine(other, other, n, [d](V z, V) { return simd::silu(d, z); });
    }
    if (p.residual_out) write(r, n, p.residual_out, row);
    if (p.z && !p.norm_before_gate) combine(r, other, n, multiply);
    for (std::int64_t at = 0; at < n; at += p.group_size)
      apply(moments(p.kind, p.eps, r + at, p.group_size), weight == nullptr ? nullptr : weight + at,
            bias == nullptr ? nullptr : bias + at, r + at, p.group_size);
    if (p.z && p.norm_before_gate) combine(r, other, n, multiply);
    write(r, n, p.out, row);
  }
}

}  // namespace
}  // namespace krait::norm_kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::norm_kernels {

HWY_EXPORT(rows);

void simd(const Problem& problem, std::int64_t begin, std::int64_t end, float* workspace) {
  HWY_DYNAMIC_DISPATCH(rows)(problem, begin, end, workspace);
}

}  // namespace krait::norm_kernels
#endif
