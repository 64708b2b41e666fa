// What this build is, for messages and reports.
#include <cstdint>

#include "core/build.h"
#include "core/device_backend.h"
#include "ffi/convert.h"
#include "krait/core/context.h"
#include "krait/ops/linear.h"

namespace krait::ffi {
namespace {

Word version() { return KRAIT_VERSION; }
bool with_cuda() { return kWithCuda; }
// Of GPUs that can be used: 0 without a driver, or where the build has no kernels for GPUs.
std::int64_t device_count() { return cuda_device_count(); }
Word simd() { return std::string(simd_target()); }
// "" without oneDNN.
Word onednn() { return onednn_version(); }

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(version, krait::ffi::version)
KRAIT_FFI(with_cuda, krait::ffi::with_cuda)
KRAIT_FFI(cuda_device_count, krait::ffi::device_count)
KRAIT_FFI(simd_target, krait::ffi::simd)
KRAIT_FFI(onednn_version, krait::ffi::onednn)
