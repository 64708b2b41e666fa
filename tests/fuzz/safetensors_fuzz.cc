#include <cstddef>
#include <cstdint>
#include <span>

#include "fuzz/touch.h"
#include "krait/core/error.h"
#include "krait/io/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    krait::io::Metadata metadata;
    const auto bytes = std::as_bytes(std::span(data, size));
    for (const auto& [name, tensor] : krait::io::parse_safetensors(bytes, nullptr, "input", &metadata))
      krait::fuzz::touch(tensor);
  } catch (const krait::Error&) {
  }
  return 0;
}
