// What ssd and ssd_backward check alike. `op` begins the messages.
#pragma once

#include <string_view>

#include "krait/core/context.h"
#include "krait/ops/ssd.h"
#include "ops/ssd/problem.h"

namespace krait::ssd_detail {

// A float dtype, f64 only beside an x of f64.
void check_float(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x);
// The same, of `shape`.
void check(std::string_view op, std::string_view name, const Tensor& t, const Tensor& x, const Dims& shape,
           std::string_view meaning);

// All of `args` is where the context works, and its path is one of that device; index tensors come to the
// host.
void bring_to_device(Context& ctx, std::string_view op, SsdArgs& args);

// Checks all inputs of `args` and returns them; D becomes (H, P). Destinations are left to the caller.
Problem problem_of(std::string_view op, const SsdArgs& args);
// (B, H, P, N), or (n, H, P, N) with cu_seqlens.
Dims state_shape_of(const SsdArgs& args);

// The fast paths take A, D and dt_bias in f32 and contiguous.
void widen_parameters(Context& ctx, Problem& problem);

}  // namespace krait::ssd_detail
