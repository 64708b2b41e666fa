// The CUDA side of a Context; declared without CUDA's headers.
#pragma once

#include <cstdint>
#include <memory>

#include "core/device_backend.h"
#include "krait/core/context.h"

namespace krait::cuda {

std::shared_ptr<DeviceBackend> make_backend(int index, void* stream);
int device_count();
// The recording of a graph that `stream` is in, which no other ever has; 0: none.
[[nodiscard]] std::uint64_t recording_of(void* stream);
// Whether the device has products of warpgroups (wgmma.cuh) and this build kernels that use them.
[[nodiscard]] bool has_warpgroup_products(const Context& ctx);

}  // namespace krait::cuda
