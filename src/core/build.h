// What this build has.
#pragma once

namespace krait {

// Kernels for GPUs, compiled for CUDA or HIP. Where it is false, `if constexpr (kWithCuda)` leaves calls of
// them out of the program.
inline constexpr bool kWithCuda = KRAIT_WITH_CUDA != 0;

}  // namespace krait
