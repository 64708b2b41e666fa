#include "ffi/convert.h"

#include <tvm/ffi/dtype.h>

#include <new>
#include <span>

#include "ffi/contexts.h"

namespace krait::ffi {
namespace {

// Nothing for element types that the library has not.
std::optional<DType> dtype_of_tensor(DLDataType type) {
  if (type.lanes != 1) return std::nullopt;
  const auto sized = [&](int bits, DType dtype) {
    return type.bits == bits ? std::optional(dtype) : std::nullopt;
  };
  switch (type.code) {
    case kDLFloat:
      return type.bits == 32   ? DType::f32
             : type.bits == 64 ? std::optional(DType::f64)
                               : sized(16, DType::f16);
    case kDLBfloat: return sized(16, DType::bf16);
    case kDLInt:
      switch (type.bits) {
        case 8: return DType::i8;
        case 16: return DType::i16;
        case 32: return DType::i32;
        case 64: return DType::i64;
        default: return std::nullopt;
      }
    case kDLUInt: return sized(8, DType::u8);
    case kDLBool: return sized(8, DType::boolean);
    case kDLComplex: return type.bits == 64 ? std::optional(DType::c64) : sized(128, DType::c128);
    default: return std::nullopt;
  }
}

std::optional<Device> device_of(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
    case kDLROCMHost: return Device{};
    case kDLCUDA:
    case kDLCUDAManaged:
    case kDLROCM: return Device{Device::Kind::cuda, device.device_id};
    default: return std::nullopt;
  }
}

std::string text_of(DLDataType type) {
  const tvm::ffi::String text = tvm::ffi::DLDataTypeToString(type);
  return {text.data(), text.size()};
}

const char* exception_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::invalid_argument: return "ValueError";
    case ErrorKind::not_found: return "FileNotFoundError";
    case ErrorKind::io: return "OSError";
    case ErrorKind::network: return "ConnectionError";
    case ErrorKind::out_of_memory: return "MemoryError";
    case ErrorKind::interrupted: return "KeyboardInterrupt";
  }
  return "RuntimeError";
}

}  // namespace

Tensor Operands::view(const char* name, const DLTensor& tensor) {
  const std::optional<DType> dtype = dtype_of_tensor(tensor.dtype);
  if (!dtype)
    fail(ErrorKind::invalid_argument, "[", op_, "] ", name, " has dtype ", text_of(tensor.dtype),
         ", expected f32, f64, bf16, f16, i8, u8, i16, i32, i64, bool, c64 or c128");
  const std::optional<Device> device = device_of(tensor.device);
  if (!device)
    fail(ErrorKind::invalid_argument, "[", op_, "] ", name, " is on a device of DLPack's type ",
         static_cast<int>(tensor.device.device_type), ", expected the CPU or a CUDA device");
  if (device->kind != Device::Kind::cpu && device_.kind == Device::Kind::cpu) device_ = *device;

  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  const Dims shape(std::span<const std::int64_t>(tensor.shape, ndim));
  auto* data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  // Strides may be left out where elements follow one another.
  if (tensor.strides == nullptr) return Tensor::wrap(data, shape, *dtype, {}, *device);
  const Dims strides(std::span<const std::int64_t>(tensor.strides, ndim));
  return Tensor::wrap(data, shape, strides, *dtype, {}, *device);
}

void rethrow() {
  try {
    throw;
  } catch (const Error& error) {
    // Python has the KeyboardInterrupt already where one of its signals has ended the work.
    if (error.kind() == ErrorKind::interrupted && signal_was_raised()) throw tvm::ffi::EnvErrorAlreadySet();
    throw tvm::ffi::Error(exception_of(error.kind()), error.what(), "");
  } catch (const std::bad_alloc&) {
    throw tvm::ffi::Error("MemoryError", "out of memory", "");
  } catch (const tvm::ffi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw tvm::ffi::Error("RuntimeError", error.what(), "");
  }
}

}  // namespace krait::ffi
