#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "fuzz/touch.h"
#include "io/torch_writer.h"
#include "krait/core/error.h"
#include "krait/io/torch_bin.h"

namespace {

void parse(std::span<const std::byte> bytes) {
  try {
    for (const auto& [name, tensor] : krait::io::parse_torch_bin(bytes, nullptr, "input"))
      krait::fuzz::touch(tensor);
  } catch (const krait::Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  parse(std::as_bytes(std::span(data, size)));
  // A pickle by itself is tried inside of an archive with two storages: mutations of a whole archive
  // seldom get past its directory.
  if (size > 0 && data[0] == 0x80) {
    std::vector<float> floats(6);
    std::iota(floats.begin(), floats.end(), 0.0F);
    const std::string pickle(reinterpret_cast<const char*>(data), size);
    const std::string file =
        krait::io::zip_of(krait::io::torch_entries(pickle, {krait::io::raw(floats), std::string(16, '\1')}));
    // Not the string itself, which has bytes to spare beyond its end.
    const std::vector<char> exact(file.begin(), file.end());
    parse(std::as_bytes(std::span(exact)));
  }
  return 0;
}
