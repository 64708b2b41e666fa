#pragma once

#include "krait/ops/projection.h"

namespace krait::projection_detail {

// On a GPU: the whole in one kernel, into destinations that are all there. False where sizes, dtypes or
// layouts are not made for it, with nothing done.
bool fused(Context& ctx, const ProjectionArgs& args, const ProjectionResult& result);

}  // namespace krait::projection_detail
