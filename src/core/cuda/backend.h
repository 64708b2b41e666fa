// The CUDA side of a Context; declared without CUDA's headers.
#pragma once

#include <memory>

#include "core/device_backend.h"
#include "krait/core/context.h"

namespace krait::cuda {

std::shared_ptr<DeviceBackend> make_backend(int index, void* stream);
int device_count();
// Whether the device has products of warpgroups (wgmma.cuh) and this build kernels that use them.
[[nodiscard]] bool has_warpgroup_products(const Context& ctx);

}  // namespace krait::cuda
