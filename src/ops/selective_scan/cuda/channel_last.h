// The forward's kernel for tensors whose channels lie side by side.
#pragma once

#include "krait/core/context.h"
#include "ops/selective_scan/cuda/pieces.h"
#include "ops/selective_scan/scan.h"

namespace krait::scan {

// True for what a Mamba block asks for: u, delta, z and out of one type whose channels lie side by side and
// aligned, softplus and gate, at most 16 states, no padding inside of a sequence, and no wanted states.
bool fits_channel_last(const Problem& problem);

// `carried`: the state before each piece that is not the first of its run: (piece, N, D). False where the
// device has too little shared memory; nothing has been done then.
bool run_channel_last(Context& ctx, const Problem& problem, const Pieces& pieces, const LanePlan& plan,
                      const float* carried);

}  // namespace krait::scan
