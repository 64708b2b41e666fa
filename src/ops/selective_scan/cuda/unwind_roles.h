// The backward's kernel for the call that a Mamba block makes.
#pragma once

#include "ops/selective_scan/cuda/kernels.h"

namespace krait::scan {

struct UnwindOperands;

// True where u, delta, dout, z, du, ddelta and dz are there, of one type and with channels side by side, dt
// comes of softplus and there are at most 16 states, on a device that moves registers from warp to warp.
bool fits_roles(const Context& ctx, const Problem& problem, const Gradients& gradients);
// Channels of a block.
inline constexpr std::int64_t kRolesChannels = 128;
// Pieces walked in turn count what is done for each warp.
inline constexpr std::int64_t kRolesWarps = 8;
void run_roles(Context& ctx, const UnwindOperands& operands);

}  // namespace krait::scan
