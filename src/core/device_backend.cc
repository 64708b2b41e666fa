#include "core/device_backend.h"

#include "core/build.h"
#include "core/cuda/backend.h"
#include "krait/core/error.h"

namespace krait {

std::shared_ptr<DeviceBackend> make_cuda_backend(int index, void* stream) {
  if constexpr (kWithCuda) return cuda::make_backend(index, stream);
  fail(ErrorKind::invalid_argument, "device cuda:", index,
       ": this build of krait has the backend cpu only (it was built without CUDA)");
}

int cuda_device_count() {
  if constexpr (kWithCuda) return cuda::device_count();
  return 0;
}

}  // namespace krait
