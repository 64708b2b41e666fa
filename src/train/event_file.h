// Event files, which TensorBoard shows: a sequence of records (TFRecord), each an `Event` message of protocol
// buffers (tensorflow/core/util/event.proto and framework/summary.proto).
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace krait {

class EventFileWriter {
 public:
  struct Scalar {
    std::string_view tag;  // "loss", "val/loss"; TensorBoard groups by what stands before a slash
    double value = 0.0;    // stored as f32
  };

  // Creates `directory`, where it is missing, and a new file in it: TensorBoard reads all event files of a
  // directory in the order of their names, which begin with the time, so that a resumed run adds one.
  explicit EventFileWriter(const std::filesystem::path& directory);
  ~EventFileWriter();
  EventFileWriter(const EventFileWriter&) = delete;
  EventFileWriter& operator=(const EventFileWriter&) = delete;

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

  // What follows begins with `step`: TensorBoard drops events of that step and later ones that files of
  // earlier sessions have.
  void start_at(std::int64_t step);
  // One event each. Its record has reached the system when the call returns. Throws Error(io) where it
  // cannot be written; the file then ends with the record before.
  void add_scalars(std::int64_t step, std::span<const Scalar> scalars);
  // Shown as it stands; what is not UTF-8 becomes U+FFFD.
  void add_text(std::int64_t step, std::string_view tag, std::string_view text);

 private:
  void write_record(std::string_view payload);

  std::filesystem::path path_;
  int descriptor_ = -1;
  std::int64_t size_ = 0;
};

// CRC-32C (Castagnoli; RFC 3720, appendix B.4).
[[nodiscard]] std::uint32_t crc32c(std::string_view bytes);

}  // namespace krait
