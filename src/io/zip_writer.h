// Zip archives as torch.save writes them: entries stored, their data at multiples of 64 bytes so that it can
// be mapped, zip64 fields where 32 bits are too few.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "krait/io/atomic_file.h"

namespace krait::io {

class ZipWriter {
 public:
  // Appends to `file`, which must be new and outlive the writer.
  explicit ZipWriter(AtomicFile& file) : file_(file) {}

  void add(const std::string& name, std::span<const std::byte> data);
  void add(const std::string& name, std::string_view text);
  // The directory. Nothing can be added afterwards.
  void finish();

 private:
  struct Entry {
    std::string name;
    std::uint64_t size;
    std::uint64_t offset;
    std::uint32_t crc;
  };
  void write(std::string_view bytes);

  AtomicFile& file_;
  std::uint64_t position_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace krait::io
