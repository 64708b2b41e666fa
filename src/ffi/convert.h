// What callers of the C ABI hand over, as the library's own types: views of tensors, words for enums, and the
// library's errors as those of the caller's language.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "krait/core/error.h"
#include "krait/core/tensor.h"

namespace krait::ffi {

// A tensor, or None where it is not given; the caller keeps it alive until the call returns.
struct Given {
  const DLTensor* tensor = nullptr;
  explicit operator bool() const { return tensor != nullptr; }
};
using Word = tvm::ffi::String;

// The tensors of one call, as views without ownership.
class Operands {
 public:
  explicit Operands(const char* op) : op_(op) {}

  // Throws Error(invalid_argument), naming the operand, for devices and element types that the library has
  // not.
  Tensor operator()(const char* name, const Given& given) {
    return given ? view(name, *given.tensor) : Tensor();
  }

  // That of the first operand on a GPU, else the CPU: an operator refuses what is elsewhere.
  [[nodiscard]] Device device() const { return device_; }

 private:
  Tensor view(const char* name, const DLTensor& tensor);

  const char* op_;
  Device device_{};
};

// The value that `word` stands for.
template <typename Enum>
Enum choice(const char* op, const char* name, const Word& word,
            std::initializer_list<std::pair<std::string_view, Enum>> choices) {
  const std::string_view wanted(word.data(), word.size());
  std::string allowed;
  for (const auto& [key, value] : choices) {
    if (key == wanted) return value;
    allowed.append(allowed.empty() ? "'" : ", '").append(key).append("'");
  }
  fail(ErrorKind::invalid_argument, "[", op, "] ", name, " is '", wanted, "', expected one of ", allowed);
}

// Throws what is being handled again, as the exception that the caller's language knows it by.
[[noreturn]] void rethrow();

template <auto function>
struct Guarded;

template <typename Result, typename... Args, Result (*function)(Args...)>
struct Guarded<function> {
  static Result call(Args... args) {
    try {
      return function(std::forward<Args>(args)...);
    } catch (...) {
      rethrow();
    }
  }
};

}  // namespace krait::ffi

// How the argument `Given` of a function is read; the names are tvm_ffi's.
// NOLINTBEGIN(readability-identifier-naming)
template <>
struct tvm::ffi::TypeTraits<krait::ffi::Given> : public tvm::ffi::TypeTraitsBase {
  static constexpr bool storage_enabled = false;
  static std::optional<krait::ffi::Given> TryCastFromAnyView(const TVMFFIAny* from) {
    switch (from->type_index) {
      case kTVMFFINone: return krait::ffi::Given{};
      case kTVMFFIDLTensorPtr: return krait::ffi::Given{static_cast<const DLTensor*>(from->v_ptr)};
      case kTVMFFITensor: return krait::ffi::Given{TVMFFITensorGetDLTensorPtr(from->v_obj)};
      default: return std::nullopt;
    }
  }
  static std::string TypeStr() { return "Optional<Tensor>"; }
  static std::string TypeSchema() { return R"({"type":"Optional","args":[{"type":"ffi.Tensor"}]})"; }
};
// NOLINTEND(readability-identifier-naming)

// Makes `function` callable under `name`. (Parameters of the outer function that it makes have names without
// use.)
#define KRAIT_FFI(name, function)                                                         \
  _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wunused-parameter\"") \
      TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, ::krait::ffi::Guarded<&function>::call)         \
          _Pragma("GCC diagnostic pop")
