#pragma once

#include "krait/ops/decode_step.h"

namespace krait::decode_detail {

// As decode_step, on a GPU; the model's layers are as many as its sizes say.
bool run(Context& ctx, const DecodeStepArgs& args);

}  // namespace krait::decode_detail
