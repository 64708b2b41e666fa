// Tensor: a typed, strided view of memory that keeps its memory alive. No graph, no lazy evaluation.
// Copying a Tensor copies the view, not the elements. A default-constructed Tensor is absent
// (operator bool is false); operators take an absent Tensor for "not given".
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iosfwd>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "krait/core/dtype.h"

namespace krait {

struct Device {
  enum class Kind : std::uint8_t { cpu, cuda };
  Kind kind = Kind::cpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};
[[nodiscard]] std::string name_of(Device device);

// Up to 8 sizes or strides, held in place.
class Dims {
 public:
  static constexpr int max_ndim = 8;

  Dims() = default;
  Dims(std::initializer_list<std::int64_t> values);
  explicit Dims(std::span<const std::int64_t> values);

  [[nodiscard]] int size() const { return size_; }
  [[nodiscard]] bool empty() const { return size_ == 0; }
  [[nodiscard]] std::int64_t operator[](int i) const { return values_[static_cast<std::size_t>(i)]; }
  [[nodiscard]] std::int64_t& operator[](int i) { return values_[static_cast<std::size_t>(i)]; }
  [[nodiscard]] const std::int64_t* begin() const { return values_.data(); }
  [[nodiscard]] const std::int64_t* end() const { return values_.data() + size_; }
  [[nodiscard]] std::int64_t back() const { return values_[static_cast<std::size_t>(size_ - 1)]; }
  void push_back(std::int64_t value);
  void insert(int at, std::int64_t value);
  void erase(int at);

  friend bool operator==(const Dims& a, const Dims& b);

 private:
  std::array<std::int64_t, max_ndim> values_{};
  int size_ = 0;
};

// "(2, 7, 4)", as messages print shapes.
std::ostream& operator<<(std::ostream& out, const Dims& dims);
std::ostream& operator<<(std::ostream& out, DType dtype);

// The number of elements of `shape`; throws where a size is negative or the product overflows 63 bits.
[[nodiscard]] std::int64_t numel_of(const Dims& shape);
// Row-major strides, in elements.
[[nodiscard]] Dims contiguous_strides(const Dims& shape);

class Tensor {
 public:
  Tensor() = default;

  // Uninitialised memory on the CPU, aligned to 64 bytes. Throws Error(out_of_memory).
  static Tensor empty(const Dims& shape, DType dtype = DType::f32);
  static Tensor zeros(const Dims& shape, DType dtype = DType::f32);
  // A view of memory that belongs to `owner` (which may be null where the caller keeps it alive).
  static Tensor wrap(void* data, const Dims& shape, DType dtype, std::shared_ptr<void> owner = {},
                     Device device = {});
  static Tensor wrap(void* data, const Dims& shape, const Dims& strides, DType dtype,
                     std::shared_ptr<void> owner = {}, Device device = {});
  // A contiguous copy of `values`.
  template <typename T>
  static Tensor from(std::span<const T> values, const Dims& shape) {
    return copy_of(values.data(), values.size(), shape, dtype_of<T>);
  }
  template <typename T>
  static Tensor from(const std::vector<T>& values, const Dims& shape) {
    return from(std::span<const T>(values), shape);
  }
  template <typename T>
  static Tensor from(const std::vector<T>& values) {
    return from(std::span<const T>(values), Dims{static_cast<std::int64_t>(values.size())});
  }

  [[nodiscard]] bool defined() const { return defined_; }
  explicit operator bool() const { return defined_; }

  [[nodiscard]] DType dtype() const { return dtype_; }
  [[nodiscard]] Device device() const { return device_; }
  [[nodiscard]] int ndim() const { return shape_.size(); }
  [[nodiscard]] const Dims& shape() const { return shape_; }
  [[nodiscard]] const Dims& strides() const { return strides_; }  // in elements
  // Negative `dim` counts from the end.
  [[nodiscard]] std::int64_t size(int dim) const { return shape_[wrap_dim(dim)]; }
  [[nodiscard]] std::int64_t stride(int dim) const { return strides_[wrap_dim(dim)]; }
  [[nodiscard]] std::int64_t numel() const { return numel_; }
  [[nodiscard]] std::size_t nbytes() const { return static_cast<std::size_t>(numel_) * size_of(dtype_); }
  [[nodiscard]] bool is_contiguous() const;

  [[nodiscard]] void* raw() const { return data_; }
  // The first element; throws where T is not the tensor's dtype.
  template <typename T>
  [[nodiscard]] T* data() const {
    check_dtype(dtype_of<T>);
    return static_cast<T*>(data_);
  }
  template <typename T>
  [[nodiscard]] std::span<T> span() const;  // contiguous tensors only

  // Views of the same memory.
  [[nodiscard]] Tensor slice(int dim, std::int64_t begin, std::int64_t end) const;
  [[nodiscard]] Tensor select(int dim, std::int64_t index) const;  // drops `dim`
  [[nodiscard]] Tensor unsqueeze(int dim) const;                   // inserts a size of 1
  [[nodiscard]] Tensor squeeze(int dim) const;                     // drops a size of 1
  [[nodiscard]] Tensor transpose(int a, int b) const;
  [[nodiscard]] Tensor permute(std::initializer_list<int> order) const;
  [[nodiscard]] Tensor expand(
      const Dims& shape) const;  // sizes of 1 (and missing leading ones) repeat with stride 0
  // Another shape of the same elements in row-major order; one size may be -1. Throws where the
  // strides do not allow a view.
  [[nodiscard]] Tensor view(const Dims& shape) const;
  [[nodiscard]] Tensor as_strided(const Dims& shape, const Dims& strides, std::int64_t offset) const;

  // Copies, of tensors on the CPU; Context has them for any device. `to` and `contiguous` return the tensor
  // itself where nothing has to change.
  [[nodiscard]] Tensor clone() const;  // contiguous
  [[nodiscard]] Tensor contiguous() const;
  [[nodiscard]] Tensor to(DType dtype) const;
  // Element by element, with conversion; shapes must be equal.
  void copy_from(const Tensor& source) const;
  void fill(double value) const;

  [[nodiscard]] const std::shared_ptr<void>& owner() const { return owner_; }

 private:
  static Tensor copy_of(const void* data, std::size_t count, const Dims& shape, DType dtype);
  [[nodiscard]] int wrap_dim(int dim) const;
  void check_dtype(DType wanted) const;
  void check_contiguous() const;
  void require_on_cpu() const;

  std::shared_ptr<void> owner_;
  void* data_ = nullptr;
  std::int64_t numel_ = 0;
  Dims shape_;
  Dims strides_;
  DType dtype_ = DType::f32;
  Device device_;
  bool defined_ = false;
};

template <typename T>
std::span<T> Tensor::span() const {
  check_contiguous();
  require_on_cpu();
  return {data<T>(), static_cast<std::size_t>(numel_)};
}

}  // namespace krait
