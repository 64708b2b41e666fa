// From a run-time DType to a compile-time type.
#pragma once

#include <type_traits>

#include "krait/core/dtype.h"
#include "krait/core/error.h"

namespace krait {

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) for the floating type of `dtype`; `what` names the tensor in the message.
template <typename F>
decltype(auto) dispatch_float(DType dtype, std::string_view what, F&& f) {
  switch (dtype) {
    case DType::f32: return f(TypeTag<float>{});
    case DType::f64: return f(TypeTag<double>{});
    case DType::bf16: return f(TypeTag<bf16>{});
    case DType::f16: return f(TypeTag<f16>{});
    default: break;
  }
  fail(ErrorKind::invalid_argument, what, " has dtype ", name_of(dtype), ", expected f32, f64, bf16 or f16");
}

// Calls f(TypeTag<T>) for every dtype.
template <typename F>
decltype(auto) dispatch_all(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(TypeTag<float>{});
    case DType::f64: return f(TypeTag<double>{});
    case DType::bf16: return f(TypeTag<bf16>{});
    case DType::f16: return f(TypeTag<f16>{});
    case DType::i8: return f(TypeTag<std::int8_t>{});
    case DType::u8: return f(TypeTag<std::uint8_t>{});
    case DType::i16: return f(TypeTag<std::int16_t>{});
    case DType::i32: return f(TypeTag<std::int32_t>{});
    case DType::i64: return f(TypeTag<std::int64_t>{});
    case DType::boolean: return f(TypeTag<bool>{});
    case DType::c64: return f(TypeTag<std::complex<float>>{});
    case DType::c128: return f(TypeTag<std::complex<double>>{});
  }
  fail(ErrorKind::invalid_argument, "unknown dtype ", static_cast<int>(dtype));
}

}  // namespace krait
