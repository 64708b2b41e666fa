// Elements of a tensor by index, for reference implementations.
#pragma once

#include <cstdint>

#include "krait/core/tensor.h"

namespace krait {

// A view of `tensor` in the dtype of T: a copy where it has another one. An absent tensor gives a view that
// is false.
template <typename T>
class View {
 public:
  explicit View(const Tensor& tensor) : tensor_(tensor ? tensor.to(dtype_of<T>) : tensor) {
    if (tensor_) data_ = tensor_.data<T>();
  }
  explicit operator bool() const { return tensor_.defined(); }
  template <typename... Index>
  T& operator()(Index... index) const {
    std::int64_t offset = 0;
    int dim = 0;
    ((offset += index * tensor_.strides()[dim++]), ...);
    return data_[offset];
  }
  // Writes the elements to `tensor`, of which this is a view or a copy.
  void store(const Tensor& tensor) const {
    if (tensor.raw() != tensor_.raw()) tensor.copy_from(tensor_);
  }

 private:
  Tensor tensor_;
  T* data_ = nullptr;
};

}  // namespace krait
