#include "krait/core/tensor.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <ostream>

#include "core/convert.h"
#include "core/dispatch.h"
#include "krait/core/error.h"

namespace krait {
namespace {

constexpr std::size_t kAlignment = 64;

std::shared_ptr<void> allocate(std::size_t bytes) {
  // A multiple of the alignment, as aligned_alloc wants, and one vector more than asked for, so that
  // kernels may load a whole vector at the last element.
  constexpr std::size_t kSlack = 2 * kAlignment;
  if (bytes > std::numeric_limits<std::size_t>::max() - kSlack)
    fail(ErrorKind::out_of_memory, "out of memory: a tensor of ", bytes, " bytes");
  const std::size_t rounded = (bytes + kSlack - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded);
  if (memory == nullptr) fail(ErrorKind::out_of_memory, "out of memory: a tensor of ", bytes, " bytes");
  return {memory, std::free};
}

// Calls f(a_offset, b_offset) for the beginning of every run along the last dimension of `shape`.
template <typename F>
void for_each_row(const Dims& shape, const Dims& a, const Dims& b, const F& f) {
  if (numel_of(shape) == 0) return;
  std::array<std::int64_t, Dims::max_ndim> index{};
  std::int64_t ia = 0;
  std::int64_t ib = 0;
  while (true) {
    f(ia, ib);
    int d = shape.size() - 2;
    for (; d >= 0; --d) {
      auto& at = index[static_cast<std::size_t>(d)];
      ia += a[d];
      ib += b[d];
      if (++at < shape[d]) break;
      ia -= a[d] * shape[d];
      ib -= b[d] * shape[d];
      at = 0;
    }
    if (d < 0) return;
  }
}

constexpr bool is_complex(DType dtype) { return dtype == DType::c64 || dtype == DType::c128; }

template <typename T>
inline constexpr bool is_complex_v =
    std::is_same_v<T, std::complex<float>> || std::is_same_v<T, std::complex<double>>;

}  // namespace

std::string name_of(Device device) {
  return device.kind == Device::Kind::cpu ? "cpu" : concat("cuda:", device.index);
}

Dims::Dims(std::initializer_list<std::int64_t> values)
    : Dims(std::span<const std::int64_t>(values.begin(), values.size())) {}

Dims::Dims(std::span<const std::int64_t> values) {
  require(values.size() <= max_ndim, "a tensor has ", values.size(), " dimensions, expected at most ",
          int{max_ndim});
  std::copy(values.begin(), values.end(), values_.begin());
  size_ = static_cast<int>(values.size());
}

void Dims::push_back(std::int64_t value) { insert(size_, value); }

void Dims::insert(int at, std::int64_t value) {
  require(size_ < max_ndim, "a tensor has more than ", int{max_ndim}, " dimensions");
  for (int i = size_; i > at; --i) (*this)[i] = (*this)[i - 1];
  (*this)[at] = value;
  ++size_;
}

void Dims::erase(int at) {
  for (int i = at; i + 1 < size_; ++i) (*this)[i] = (*this)[i + 1];
  --size_;
}

bool operator==(const Dims& a, const Dims& b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

std::ostream& operator<<(std::ostream& out, const Dims& dims) {
  out << '(';
  for (int i = 0; i < dims.size(); ++i) out << (i == 0 ? "" : ", ") << dims[i];
  return out << (dims.size() == 1 ? ",)" : ")");
}

std::ostream& operator<<(std::ostream& out, DType dtype) { return out << name_of(dtype); }

std::int64_t numel_of(const Dims& shape) {
  std::int64_t count = 1;
  bool zero = false;
  for (const std::int64_t size : shape) {
    require(size >= 0, "shape ", shape, " has a negative size");
    zero = zero || size == 0;
  }
  if (zero) return 0;
  for (const std::int64_t size : shape)
    require(!__builtin_mul_overflow(count, size, &count), "shape ", shape, " has more than 2^63 elements");
  return count;
}

Dims contiguous_strides(const Dims& shape) {
  Dims strides = shape;
  // An empty tensor may have sizes whose product overflows; nothing is ever at its strides.
  std::uint64_t step = 1;
  for (int i = shape.size() - 1; i >= 0; --i) {
    strides[i] = static_cast<std::int64_t>(step);
    step *= static_cast<std::uint64_t>(std::max<std::int64_t>(shape[i], 1));
  }
  return strides;
}

Tensor Tensor::empty(const Dims& shape, DType dtype) {
  const std::int64_t count = numel_of(shape);
  std::size_t bytes = 0;
  if (__builtin_mul_overflow(static_cast<std::size_t>(count), size_of(dtype), &bytes))
    fail(ErrorKind::out_of_memory, "out of memory: a tensor of shape ", shape, " and dtype ", dtype);
  auto owner = allocate(bytes);
  void* data = owner.get();
  return wrap(data, shape, dtype, std::move(owner));
}

Tensor Tensor::zeros(const Dims& shape, DType dtype) {
  Tensor t = empty(shape, dtype);
  std::memset(t.data_, 0, t.nbytes());
  return t;
}

Tensor Tensor::wrap(void* data, const Dims& shape, DType dtype, std::shared_ptr<void> owner, Device device) {
  return wrap(data, shape, contiguous_strides(shape), dtype, std::move(owner), device);
}

Tensor Tensor::wrap(void* data, const Dims& shape, const Dims& strides, DType dtype,
                    std::shared_ptr<void> owner, Device device) {
  require(shape.size() == strides.size(), "shape ", shape, " and strides ", strides, " differ in length");
  Tensor t;
  t.numel_ = numel_of(shape);
  t.owner_ = std::move(owner);
  t.data_ = data;
  t.shape_ = shape;
  t.strides_ = strides;
  t.dtype_ = dtype;
  t.device_ = device;
  t.defined_ = true;
  return t;
}

Tensor Tensor::copy_of(const void* data, std::size_t count, const Dims& shape, DType dtype) {
  Tensor t = empty(shape, dtype);
  require(static_cast<std::size_t>(t.numel_) == count, count, " values for a tensor of shape ", shape);
  if (count != 0) std::memcpy(t.data_, data, t.nbytes());
  return t;
}

int Tensor::wrap_dim(int dim) const {
  const int wrapped = dim < 0 ? dim + ndim() : dim;
  require(wrapped >= 0 && wrapped < ndim(), "dimension ", dim, " of a tensor of shape ", shape_);
  return wrapped;
}

void Tensor::check_dtype(DType wanted) const {
  require(defined_, "an absent tensor was read as ", wanted);
  require(dtype_ == wanted, "a tensor of dtype ", dtype_, " was read as ", wanted);
}

void Tensor::require_on_cpu() const {
  require(device_.kind == Device::Kind::cpu, "a tensor on ", name_of(device_),
          " was used as one on the CPU; expected Context::copy, fill, clone or to");
}

void Tensor::check_contiguous() const {
  require(is_contiguous(), "a tensor of shape ", shape_, " with strides ", strides_, " is not contiguous");
}

bool Tensor::is_contiguous() const {
  if (numel_ == 0) return true;
  std::int64_t step = 1;
  for (int i = ndim() - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != step) return false;
    step *= shape_[i];
  }
  return true;
}

Tensor Tensor::slice(int dim, std::int64_t begin, std::int64_t end) const {
  const int d = wrap_dim(dim);
  require(begin >= 0 && begin <= end && end <= shape_[d], "slice [", begin, ", ", end, ") of dimension ", d,
          " of a tensor of shape ", shape_);
  Dims shape = shape_;
  shape[d] = end - begin;
  return as_strided(shape, strides_, shape[d] == 0 ? 0 : begin * strides_[d]);
}

Tensor Tensor::select(int dim, std::int64_t index) const {
  const int d = wrap_dim(dim);
  require(index >= 0 && index < shape_[d], "index ", index, " of dimension ", d, " of a tensor of shape ",
          shape_);
  Dims shape = shape_;
  Dims strides = strides_;
  shape.erase(d);
  strides.erase(d);
  return as_strided(shape, strides, index * strides_[d]);
}

Tensor Tensor::unsqueeze(int dim) const {
  const int d = dim < 0 ? dim + ndim() + 1 : dim;
  require(d >= 0 && d <= ndim(), "dimension ", dim, " of a tensor of shape ", shape_);
  Dims shape = shape_;
  Dims strides = strides_;
  const std::int64_t stride = d < ndim() ? shape_[d] * strides_[d] : 1;
  shape.insert(d, 1);
  strides.insert(d, stride);
  return as_strided(shape, strides, 0);
}

Tensor Tensor::squeeze(int dim) const {
  require(size(dim) == 1, "dimension ", dim, " of a tensor of shape ", shape_, " is not 1");
  return select(dim, 0);
}

Tensor Tensor::transpose(int a, int b) const {
  Dims shape = shape_;
  Dims strides = strides_;
  std::swap(shape[wrap_dim(a)], shape[wrap_dim(b)]);
  std::swap(strides[wrap_dim(a)], strides[wrap_dim(b)]);
  return as_strided(shape, strides, 0);
}

Tensor Tensor::permute(std::initializer_list<int> order) const {
  require(static_cast<int>(order.size()) == ndim(), "permute with ", order.size(),
          " dimensions of a tensor of shape ", shape_);
  Dims shape;
  Dims strides;
  unsigned seen = 0;
  for (const int dim : order) {
    const int d = wrap_dim(dim);
    require((seen >> d & 1U) == 0U, "permute names dimension ", d, " twice");
    seen |= 1U << d;
    shape.push_back(shape_[d]);
    strides.push_back(strides_[d]);
  }
  return as_strided(shape, strides, 0);
}

Tensor Tensor::expand(const Dims& shape) const {
  const int extra = shape.size() - ndim();
  require(extra >= 0, "expand of shape ", shape_, " to ", shape);
  Dims strides = shape;
  for (int i = 0; i < shape.size(); ++i) {
    const std::int64_t old = i < extra ? 1 : shape_[i - extra];
    require(old == shape[i] || old == 1, "expand of shape ", shape_, " to ", shape);
    strides[i] = old == shape[i] && i >= extra ? strides_[i - extra] : 0;
  }
  return as_strided(shape, strides, 0);
}

Tensor Tensor::view(const Dims& wanted) const {
  Dims shape = wanted;
  int infer = -1;
  std::int64_t known = 1;
  for (int i = 0; i < shape.size(); ++i) {
    if (shape[i] == -1) {
      require(infer < 0, "view to ", wanted, ": more than one -1");
      infer = i;
    } else {
      known *= shape[i];
    }
  }
  if (infer >= 0) shape[infer] = known == 0 ? 0 : numel_ / known;
  require(numel_of(shape) == numel_, "view of shape ", shape_, " as ", wanted);
  if (numel_ == 0 || is_contiguous()) return as_strided(shape, contiguous_strides(shape), 0);
  // Match runs of old dimensions that are contiguous among themselves to runs of new ones.
  Dims strides = shape;
  int o = ndim() - 1;
  int n = shape.size() - 1;
  while (o >= 0 && n >= 0) {
    std::int64_t old_size = shape_[o];
    std::int64_t new_size = shape[n];
    std::int64_t step = strides_[o];
    strides[n] = step;
    while (old_size != new_size) {
      if (old_size < new_size) {
        --o;
        require(o >= 0 && (shape_[o] == 1 || strides_[o] == strides_[o + 1] * shape_[o + 1]),
                "a tensor of shape ", shape_, " with strides ", strides_, " has no view of shape ", wanted);
        old_size *= shape_[o];
      } else {
        step *= shape[n];
        --n;
        strides[n] = step;
        new_size *= shape[n];
      }
    }
    --o;
    --n;
  }
  for (; n >= 0; --n) strides[n] = 1;  // only sizes of 1 are left
  return as_strided(shape, strides, 0);
}

Tensor Tensor::as_strided(const Dims& shape, const Dims& strides, std::int64_t offset) const {
  Tensor t = *this;
  t.numel_ = numel_of(shape);
  t.shape_ = shape;
  t.strides_ = strides;
  // An empty tensor may have no memory at all; offsetting a null pointer is undefined.
  if (data_ != nullptr)
    t.data_ = static_cast<std::byte*>(data_) + offset * static_cast<std::int64_t>(size_of(dtype_));
  return t;
}

Tensor Tensor::clone() const {
  Tensor t = empty(shape_, dtype_);
  t.copy_from(*this);
  return t;
}

Tensor Tensor::contiguous() const { return is_contiguous() ? *this : clone(); }

Tensor Tensor::to(DType dtype) const {
  if (dtype == dtype_) return *this;
  Tensor t = empty(shape_, dtype);
  t.copy_from(*this);
  return t;
}

void Tensor::copy_from(const Tensor& source) const {
  require(defined_ && source.defined_, "copy_from with an absent tensor");
  require(shape_ == source.shape_, "copy_from: shape ", source.shape_, ", expected ", shape_);
  require_on_cpu();
  source.require_on_cpu();
  if (numel_ == 0) return;
  if (dtype_ == source.dtype_ && is_contiguous() && source.is_contiguous()) {
    std::memmove(data_, source.data_, nbytes());
    return;
  }
  require(is_complex(dtype_) == is_complex(source.dtype_), "copy_from: dtype ", source.dtype_, " to ",
          dtype_);
  dispatch_all(dtype_, [&](auto to_tag) {
    using To = typename decltype(to_tag)::type;
    dispatch_all(source.dtype_, [&](auto from_tag) {
      using From = typename decltype(from_tag)::type;
      if constexpr (is_complex_v<To> == is_complex_v<From>) {
        auto* to = static_cast<To*>(data_);
        const auto* from = static_cast<const From*>(source.data_);
        const std::int64_t run = ndim() == 0 ? 1 : shape_.back();
        const std::int64_t to_step = ndim() == 0 ? 1 : strides_.back();
        const std::int64_t from_step = ndim() == 0 ? 1 : source.strides_.back();
        for_each_row(shape_, strides_, source.strides_, [&](std::int64_t a, std::int64_t b) {
          // The plain loop vectorises where both runs are contiguous.
          if (to_step == 1 && from_step == 1) {
            for (std::int64_t i = 0; i < run; ++i) to[a + i] = convert<To>(from[b + i]);
          } else {
            for (std::int64_t i = 0; i < run; ++i) to[a + i * to_step] = convert<To>(from[b + i * from_step]);
          }
        });
      }
    });
  });
}

void Tensor::fill(double value) const {
  require_on_cpu();
  if (value == 0.0 && !std::signbit(value) && is_contiguous()) {  // gradients of a whole model, each step
    if (nbytes() > 0) std::memset(data_, 0, nbytes());
    return;
  }
  dispatch_all(dtype_, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* to = static_cast<T*>(data_);
    const auto element = [&] {
      if constexpr (is_complex_v<T>)
        return T(static_cast<typename T::value_type>(value));
      else
        return convert<T>(value);
    }();
    const std::int64_t run = ndim() == 0 ? 1 : shape_.back();
    const std::int64_t step = ndim() == 0 ? 1 : strides_.back();
    for_each_row(shape_, strides_, strides_, [&](std::int64_t a, std::int64_t) {
      for (std::int64_t i = 0; i < run; ++i) to[a + i * step] = element;
    });
  });
}

}  // namespace krait
