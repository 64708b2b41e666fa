#include "train/event_file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <array>
#include <chrono>
#include <cmath>
#include <csignal>
#include <limits>
#include <map>

#include "io/scratch.h"

namespace krait {
namespace {

using io::content_of;

// A reader written from the format's description alone.

std::uint32_t slow_crc32c(std::string_view bytes) {
  std::uint32_t crc = 0xFFFFFFFFU;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1U) != 0 ? (crc >> 1) ^ 0x82F63B78U : crc >> 1;
  }
  return crc ^ 0xFFFFFFFFU;
}

std::uint64_t little_endian(std::string_view bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = bytes.size(); i > 0; --i)
    value = value << 8 | static_cast<unsigned char>(bytes[i - 1]);
  return value;
}

std::vector<std::string> records_of(std::string_view file) {
  const auto expect_checksum = [](std::string_view bytes, std::string_view stored) {
    const std::uint32_t crc = slow_crc32c(bytes);
    EXPECT_EQ(static_cast<std::uint32_t>(little_endian(stored)), ((crc >> 15) | (crc << 17)) + 0xA282EAD8U);
  };
  std::vector<std::string> records;
  while (!file.empty()) {
    if (file.size() < 16) throw std::runtime_error("half a record");
    const std::uint64_t length = little_endian(file.substr(0, 8));
    expect_checksum(file.substr(0, 8), file.substr(8, 4));
    if (file.size() - 16 < length) throw std::runtime_error("half a record");
    const std::string_view payload = file.substr(12, length);
    expect_checksum(payload, file.substr(12 + length, 4));
    records.emplace_back(payload);
    file.remove_prefix(16 + length);
  }
  return records;
}

// The fields of a message: varints and fixed numbers as they are, the rest as bytes.
struct Fields {
  std::multimap<int, std::uint64_t> numbers;
  std::multimap<int, std::string> bytes;

  explicit Fields(std::string_view in) {
    const auto varint = [&] {
      std::uint64_t value = 0;
      for (unsigned shift = 0;; shift += 7) {
        if (in.empty() || shift > 63) throw std::runtime_error("bad varint");
        const auto byte = static_cast<unsigned char>(in.front());
        in.remove_prefix(1);
        value |= std::uint64_t{byte & 0x7FU} << shift;
        if (byte < 0x80) return value;
      }
    };
    const auto take = [&](std::uint64_t count) {
      if (count > in.size()) throw std::runtime_error("a field that ends beyond its message");
      const std::string_view part = in.substr(0, count);
      in.remove_prefix(count);
      return part;
    };
    while (!in.empty()) {
      const std::uint64_t key = varint();
      const int field = static_cast<int>(key >> 3);
      switch (key & 7U) {
        case 0: numbers.emplace(field, varint()); break;
        case 1: numbers.emplace(field, little_endian(take(8))); break;
        case 2: bytes.emplace(field, take(varint())); break;
        case 5: numbers.emplace(field, little_endian(take(4))); break;
        default: throw std::runtime_error("unknown wire type");
      }
    }
  }
  [[nodiscard]] std::uint64_t number(int field) const {
    EXPECT_EQ(numbers.count(field), 1U) << "field " << field;
    return numbers.find(field)->second;
  }
  [[nodiscard]] const std::string& text(int field) const {
    EXPECT_EQ(bytes.count(field), 1U) << "field " << field;
    return bytes.find(field)->second;
  }
  [[nodiscard]] Fields message(int field) const { return Fields(text(field)); }
  [[nodiscard]] double f64(int field) const { return std::bit_cast<double>(number(field)); }
  [[nodiscard]] float f32(int field) const {
    return std::bit_cast<float>(static_cast<std::uint32_t>(number(field)));
  }
};

double now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

TEST(Crc32c, KnownVectors) {
  EXPECT_EQ(crc32c(""), 0U);
  EXPECT_EQ(crc32c("123456789"), 0xE3069283U);
  // RFC 3720, appendix B.4.
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAU);
  EXPECT_EQ(crc32c(std::string(32, '\xFF')), 0x62A8AB43U);
  std::string ascending;
  for (int i = 0; i < 32; ++i) ascending.push_back(static_cast<char>(i));
  EXPECT_EQ(crc32c(ascending), 0x46DD794EU);
}

TEST(EventFile, Scalars) {
  const io::Scratch scratch;
  const double before = now();
  EventFileWriter writer(scratch / "logs");
  const std::array<EventFileWriter::Scalar, 3> scalars{
      {{"loss", 3.25}, {"lr", 1e-3}, {"grad_norm", std::numeric_limits<double>::quiet_NaN()}}};
  writer.add_scalars(7, scalars);
  writer.add_scalars(std::int64_t{1} << 40, std::span(scalars).first(1));

  // Everything has reached the file while the writer is still open.
  const auto records = records_of(content_of(writer.path()));
  ASSERT_EQ(records.size(), 3U);
  const Fields version(records[0]);
  EXPECT_EQ(version.text(3), "brain.Event:2");
  EXPECT_GE(version.f64(1), before);
  EXPECT_LE(version.f64(1), now());

  const Fields event(records[1]);
  EXPECT_EQ(event.number(2), 7U);
  EXPECT_GE(event.f64(1), version.f64(1));
  const Fields summary = event.message(5);
  ASSERT_EQ(summary.bytes.count(1), 3U);
  auto entry = summary.bytes.find(1);
  EXPECT_EQ(Fields(entry->second).text(1), "loss");
  EXPECT_EQ(Fields(entry->second).f32(2), 3.25F);
  ++entry;
  EXPECT_EQ(Fields(entry->second).text(1), "lr");
  EXPECT_EQ(Fields(entry->second).f32(2), 1e-3F);
  ++entry;
  EXPECT_TRUE(std::isnan(Fields(entry->second).f32(2)));

  EXPECT_EQ(Fields(records[2]).number(2), std::uint64_t{1} << 40);
}

// SessionLog START, at which TensorBoard purges the steps from there on that it has read before.
TEST(EventFile, SessionStart) {
  const io::Scratch scratch;
  EventFileWriter writer(scratch.path());
  writer.start_at(6);
  const auto records = records_of(content_of(writer.path()));
  ASSERT_EQ(records.size(), 2U);
  const Fields event(records[1]);
  EXPECT_EQ(event.number(2), 6U);
  EXPECT_EQ(event.message(7).number(1), 1U);  // session_log: status: START
}

TEST(EventFile, Text) {
  const io::Scratch scratch;
  EventFileWriter writer(scratch.path());
  writer.add_text(300, "sample", "# ROMEO:\n*What* light\xFF?\n");
  const auto records = records_of(content_of(writer.path()));
  ASSERT_EQ(records.size(), 2U);
  const Fields event(records[1]);
  EXPECT_EQ(event.number(2), 300U);
  const Fields value = event.message(5).message(1);
  EXPECT_EQ(value.text(1), "sample");
  EXPECT_EQ(value.message(9).message(1).text(1), "text");  // metadata: plugin_data: plugin_name
  const Fields tensor = value.message(8);
  EXPECT_EQ(tensor.number(1), 7U);  // DT_STRING
  EXPECT_EQ(tensor.text(2), "");    // no dimensions
  EXPECT_EQ(tensor.text(8), "    # ROMEO:\n    *What* light\xEF\xBF\xBD?\n    ");
}

// Lengths of two bytes, and one that is not a multiple of anything.
TEST(EventFile, LongText) {
  const io::Scratch scratch;
  EventFileWriter writer(scratch.path());
  const std::string text(70'001, 'x');
  writer.add_text(0, "sample", text);
  const auto records = records_of(content_of(writer.path()));
  EXPECT_EQ(Fields(records.at(1)).message(5).message(1).message(8).text(8), "    " + text);
}

TEST(EventFile, EachWriterHasAFileOfItsOwn) {
  const io::Scratch scratch;
  EventFileWriter first(scratch.path());
  const std::string before = content_of(first.path());
  EventFileWriter second(scratch.path());
  EXPECT_NE(first.path(), second.path());
  EXPECT_EQ(content_of(first.path()), before);
  for (const EventFileWriter* writer : {&first, &second})
    EXPECT_TRUE(writer->path().filename().string().starts_with("events.out.tfevents."));
}

TEST(EventFile, NamesWhatIsWrong) {
  const io::Scratch scratch;
  const auto file = scratch.put("file", "x");
  EXPECT_MESSAGE(EventFileWriter(file / "logs"), "file/logs: cannot be created: Not a directory");
  EXPECT_MESSAGE(EventFileWriter{file}, "file");
  EXPECT_EQ(content_of(file), "x");
}

// As on a full disk: what does not fit leaves the records before it as they were.
TEST(EventFile, FullDisk) {
  const io::Scratch scratch;
  EventFileWriter writer(scratch.path());
  writer.add_text(1, "sample", "short");
  const std::string before = content_of(writer.path());

  rlimit old{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = old;
  small.rlim_cur = before.size() + 50;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string message = io::message_of([&] { writer.add_text(2, "sample", std::string(1000, 'x')); });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, handler);

  EXPECT_EQ(message, writer.path().string() + ": cannot be written: File too large");
  EXPECT_EQ(content_of(writer.path()), before);
  writer.add_text(3, "sample", "again");
  const auto records = records_of(content_of(writer.path()));
  ASSERT_EQ(records.size(), 3U);
  EXPECT_EQ(Fields(records[2]).number(2), 3U);
}

}  // namespace
}  // namespace krait
