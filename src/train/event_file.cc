#include "train/event_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <iomanip>
#include <limits>
#include <sstream>

#include "io/system_error.h"
#include "tokenizer/unicode.h"

namespace krait {
namespace fs = std::filesystem;
namespace {

template <typename T>
void append_little_endian(std::string& out, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) out.push_back(static_cast<char>((value >> (8 * i)) & 0xFFU));
}

// A message of protocol buffers: each field is its number and wire type, then its value.
class Message {
 public:
  Message& integer(std::uint32_t field, std::int64_t value) {
    key(field, 0);
    varint(static_cast<std::uint64_t>(value));
    return *this;
  }
  Message& f64(std::uint32_t field, double value) {
    key(field, 1);
    append_little_endian(bytes_, std::bit_cast<std::uint64_t>(value));
    return *this;
  }
  Message& f32(std::uint32_t field, float value) {
    key(field, 5);
    append_little_endian(bytes_, std::bit_cast<std::uint32_t>(value));
    return *this;
  }
  Message& text(std::uint32_t field, std::string_view value) {
    key(field, 2);
    varint(value.size());
    bytes_.append(value);
    return *this;
  }
  Message& message(std::uint32_t field, const Message& value) { return text(field, value.bytes_); }

  [[nodiscard]] const std::string& bytes() const { return bytes_; }

 private:
  void key(std::uint32_t field, std::uint32_t wire_type) { varint((field << 3) | wire_type); }
  void varint(std::uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes_.push_back(static_cast<char>((value & 0x7F) | 0x80));
    bytes_.push_back(static_cast<char>(value));
  }

  std::string bytes_;
};

// Field numbers of the messages that are written here.
namespace event {
constexpr std::uint32_t kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5, kSessionLog = 7;
}
namespace session_log {
constexpr std::uint32_t kStatus = 1;
constexpr std::int64_t kStart = 1;  // START
}  // namespace session_log
namespace summary {
constexpr std::uint32_t kValue = 1;
}
namespace value {
constexpr std::uint32_t kTag = 1, kSimpleValue = 2, kTensor = 8, kMetadata = 9;
}
namespace metadata {
constexpr std::uint32_t kPluginData = 1, kPluginName = 1;
}
namespace tensor {
constexpr std::uint32_t kDtype = 1, kShape = 2, kStringValue = 8;
constexpr std::int64_t kString = 7;  // DT_STRING
}  // namespace tensor

double seconds_since_1970() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

Message new_event(std::int64_t step) {
  Message message;
  message.f64(event::kWallTime, seconds_since_1970()).integer(event::kStep, step);
  return message;
}

// "events.out.tfevents.1700000000.host.4711.0", as TensorFlow and PyTorch name them.
fs::path file_name(int number) {
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0 || host[0] == '\0') host = {"localhost"};
  std::ostringstream name;
  name << "events.out.tfevents." << std::setw(10) << std::setfill('0')
       << static_cast<std::int64_t>(seconds_since_1970()) << '.' << host.data() << '.' << ::getpid() << '.'
       << number;
  return name.str();
}

// TensorBoard takes text for Markdown, in which lines that begin with four spaces are shown as they stand.
std::string as_code_block(std::string_view text) {
  std::string valid;
  tokenizer::append_valid_utf8(valid, text, /*at_end=*/true);
  std::string out = "    ";
  for (const char c : valid) {
    out.push_back(c);
    if (c == '\n') out.append("    ");
  }
  return out;
}

// Records store the checksum of data that may itself hold checksums, and so store it changed.
std::uint32_t masked(std::uint32_t crc) { return std::rotr(crc, 15) + 0xA282EAD8U; }

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0x82F63B78U : 0U);
    table[i] = crc;
  }
  return table;
}

}  // namespace

std::uint32_t crc32c(std::string_view bytes) {
  static constexpr std::array<std::uint32_t, 256> kTable = make_crc_table();
  std::uint32_t crc = 0xFFFFFFFFU;
  for (const char c : bytes) crc = kTable[(crc ^ static_cast<unsigned char>(c)) & 0xFFU] ^ (crc >> 8);
  return ~crc;
}

EventFileWriter::EventFileWriter(const fs::path& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) io::fail_errno(error.value(), directory, "cannot be created");
  for (int number = 0; descriptor_ < 0; ++number) {
    path_ = directory / file_name(number);
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
    if (descriptor_ < 0 && errno != EEXIST) io::fail_errno(errno, path_, "cannot be created");
  }
  try {
    write_record(Message()
                     .f64(event::kWallTime, seconds_since_1970())
                     .text(event::kFileVersion, "brain.Event:2")
                     .bytes());
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

EventFileWriter::~EventFileWriter() { ::close(descriptor_); }

void EventFileWriter::start_at(std::int64_t step) {
  const Message log = Message().integer(session_log::kStatus, session_log::kStart);
  write_record(new_event(step).message(event::kSessionLog, log).bytes());
}

void EventFileWriter::add_scalars(std::int64_t step, std::span<const Scalar> scalars) {
  Message values;
  for (const Scalar& scalar : scalars)
    values.message(
        summary::kValue,
        Message().text(value::kTag, scalar.tag).f32(value::kSimpleValue, static_cast<float>(scalar.value)));
  write_record(new_event(step).message(event::kSummary, values).bytes());
}

void EventFileWriter::add_text(std::int64_t step, std::string_view tag, std::string_view text) {
  const Message plugin = Message().text(metadata::kPluginName, "text");
  const Message content = Message()
                              .integer(tensor::kDtype, tensor::kString)
                              .message(tensor::kShape, Message())  // one text: no dimensions
                              .text(tensor::kStringValue, as_code_block(text));
  const Message entry = Message()
                            .text(value::kTag, tag)
                            .message(value::kTensor, content)
                            .message(value::kMetadata, Message().message(metadata::kPluginData, plugin));
  write_record(new_event(step).message(event::kSummary, Message().message(summary::kValue, entry)).bytes());
}

void EventFileWriter::write_record(std::string_view payload) {
  std::string record;
  append_little_endian(record, static_cast<std::uint64_t>(payload.size()));
  append_little_endian(record, masked(crc32c(record)));
  record.append(payload);
  append_little_endian(record, masked(crc32c(payload)));

  std::string_view rest = record;
  while (!rest.empty()) {
    const ssize_t written = ::write(descriptor_, rest.data(), rest.size());
    if (written < 0) {
      if (errno == EINTR) continue;
      const int error = errno;
      // Readers stop at half a record, and would never see those that follow. Where this fails too, there is
      // nothing left to do about it.
      [[maybe_unused]] const int cut = ::ftruncate(descriptor_, size_);
      io::fail_errno(error, path_, "cannot be written");
    }
    rest.remove_prefix(static_cast<std::size_t>(written));
  }
  size_ += static_cast<std::int64_t>(record.size());
}

}  // namespace krait
