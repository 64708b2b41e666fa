#include <cstddef>
#include <cstdint>
#include <span>

#include "fuzz/touch.h"
#include "krait/core/error.h"
#include "krait/io/npy.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    krait::fuzz::touch(krait::io::parse_npy(std::as_bytes(std::span(data, size)), nullptr, "input"));
  } catch (const krait::Error&) {
  }
  return 0;
}
