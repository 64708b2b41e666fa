// The CUDA side of a Context; declared without CUDA's headers.
#pragma once

#include <memory>

#include "core/device_backend.h"

namespace krait::cuda {

std::shared_ptr<DeviceBackend> make_backend(int index, void* stream);
int device_count();

}  // namespace krait::cuda
