#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "krait/core/error.h"
#include "train/token_file.h"

// Reads every id and the whole index, at an address as a mapped file has one.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::unique_ptr<std::byte[]> copy(new std::byte[size]);
  if (size != 0) std::memcpy(copy.get(), data, size);
  try {
    const auto file = krait::dataset::parse_token_file({copy.get(), size}, nullptr, "input");
    krait::dataset::TokenStream stream(file.vocab_size);
    stream.add(file.part);
    std::vector<std::int64_t> ids(static_cast<std::size_t>(stream.size()));
    stream.read(0, ids);
    for (std::int64_t at = 0; at < stream.size(); at = stream.next_document_end(at)) continue;
  } catch (const krait::Error&) {
  }
  return 0;
}
