// Views for array libraries that cannot describe what they hold.
#include <memory>

#include "ffi/convert.h"

namespace krait::ffi {
namespace {

struct Held {
  tvm::ffi::Tensor source;
  DLManagedTensor view;
};

// The same memory as bfloat16: of 16-bit numbers, as which NumPy hands its bfloat16 over.
tvm::ffi::Tensor view_as_bfloat16(const tvm::ffi::Tensor& bits) {
  require(bits.dtype().bits == 16 && bits.dtype().lanes == 1, "[view_as_bfloat16] the elements have ",
          static_cast<int>(bits.dtype().bits), " bits, expected 16");
  auto held = std::make_unique<Held>(Held{bits, {}});
  held->view.dl_tensor = *bits.GetDLTensorPtr();
  held->view.dl_tensor.dtype = {kDLBfloat, 16, 1};
  held->view.manager_ctx = held.get();
  held->view.deleter = [](DLManagedTensor* self) { delete static_cast<Held*>(self->manager_ctx); };
  return tvm::ffi::Tensor::FromDLPack(&held.release()->view);
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(view_as_bfloat16, krait::ffi::view_as_bfloat16)
