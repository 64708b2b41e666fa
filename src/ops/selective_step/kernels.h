#pragma once

#include "krait/ops/selective_step.h"

namespace krait::selective_step_detail {

// On a GPU, in one kernel. False where sizes, dtypes or layouts are not made for it, with nothing done.
bool fused(Context& ctx, const SelectiveStepArgs& args, const Tensor& out);

}  // namespace krait::selective_step_detail
