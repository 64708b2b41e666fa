// Archives that two readers could read differently, and broken ones.
#include "io/zip.h"

#include <gtest/gtest.h>

#include "io/scratch.h"
#include "io/torch_writer.h"
#include "krait/io/torch_bin.h"

namespace krait::io {
namespace {

// Names and contents in one line.
std::string read(const std::string& content) {
  const Memory memory(content);
  const ZipArchive zip(memory.bytes, "f");
  std::string out;
  for (const auto& [name, data] : zip.entries()) {
    out += concat(name, "=", std::string(reinterpret_cast<const char*>(data.data()), data.size()), ";");
  }
  return out;
}

const std::vector<ZipEntry> kTwo{{.name = "x/a", .data = "one"}, {.name = "x/b", .data = "three"}};

std::vector<ZipEntry> two_with(void (*change)(ZipEntry&)) {
  auto entries = kTwo;
  change(entries[0]);
  return entries;
}

TEST(Zip, ReadsWhatWritersWrite) {
  const std::string expected = "x/a=one;x/b=three;";
  EXPECT_EQ(read(zip_of(kTwo)), expected);
  EXPECT_EQ(read(zip_of(kTwo, {.zip64_end = false})), expected);
  EXPECT_EQ(read(zip_of(kTwo, {.alignment = 0})), expected);
  EXPECT_EQ(read(zip_of(two_with([](ZipEntry& e) { e.flags = 0; }))), expected);
  EXPECT_EQ(read(zip_of(two_with([](ZipEntry& e) { e.wide = true; }))), expected);
  EXPECT_EQ(read(zip_of(two_with([](ZipEntry& e) { e.wide = true, e.flags = 0; }))), expected);
  EXPECT_EQ(read(zip_of({})), "");
}

TEST(Zip, RefusesEveryTruncation) {
  for (const bool zip64 : {false, true}) {
    const std::string content = zip_of(kTwo, {.zip64_end = zip64});
    for (std::size_t size = 0; size < content.size(); ++size) {
      SCOPED_TRACE(size);
      EXPECT_MESSAGE(read(content.substr(0, size)), "f: ");
      EXPECT_MESSAGE(read(content.substr(content.size() - size)), "f: ");
    }
  }
}

TEST(Zip, RefusesTricks) {
  const struct {
    const char* what;
    std::string content;
    const char* message;
  } cases[] = {
      {"compressed", zip_of(two_with([](ZipEntry& e) { e.method = 8; })), "\"x/a\" is compressed (method 8)"},
      {"encrypted", zip_of(two_with([](ZipEntry& e) { e.flags |= 1; })), "\"x/a\" is encrypted"},
      {"strongly encrypted", zip_of(two_with([](ZipEntry& e) { e.flags |= 0x40; })), "is encrypted"},
      {"hidden headers", zip_of(two_with([](ZipEntry& e) { e.flags |= 0x2000; })), "is encrypted"},
      {"two of a name", zip_of({kTwo[0], kTwo[0]}), "\"x/a\" is there twice"},
      {"another local name", zip_of(two_with([](ZipEntry& e) { e.local_name = "x/A"; })), "contradicts"},
      {"longer in the directory", zip_of(two_with([](ZipEntry& e) { e.central_size = 4; })),
       "data descriptor"},
      {"shorter in the directory", zip_of(two_with([](ZipEntry& e) { e.central_size = 2; })),
       "data descriptor"},
      {"far too long", zip_of(two_with([](ZipEntry& e) { e.central_size = 0xfffffffe; })),
       "expected at most"},
      {"2^63 bytes",
       zip_of(two_with([](ZipEntry& e) { e.wide = true, e.central_size = std::uint64_t{1} << 63; })),
       "expected at most"},
      {"2^64 bytes", zip_of(two_with([](ZipEntry& e) { e.wide = true, e.central_size = ~std::uint64_t{0}; })),
       "expected at most"},
      {"another size after the data", zip_of(two_with([](ZipEntry& e) { e.descriptor_size = 2; })),
       "descriptor"},
      {"shared data", zip_of({kTwo[0], {.name = "x/b", .data = "one", .central_offset = 0}}),
       "no local header"},
      {"starting later", zip_of(two_with([](ZipEntry& e) { e.central_offset = 8; })), "expected 0"},
      {"starting beyond the file", zip_of(two_with([](ZipEntry& e) { e.central_offset = 0xfffffff0; })),
       "expected"},
      {"unlisted bytes", zip_of(kTwo, {.gap = "hidden"}), "expected a data descriptor"},
      {"only unlisted bytes", zip_of({}, {.gap = "hidden"}), "6 bytes that belong to no entry"},
      {"a comment", zip_of(kTwo, {.comment = "hidden"}), "does not end as a zip archive does"},
      {"a comment that is an end record", zip_of(kTwo, {.comment = zip_of({}, {.zip64_end = false})}),
       "expected to end at byte"},
      {"two archives in a row", zip_of(kTwo) + zip_of(kTwo), "zip64 end record that is not where"},
      {"two short archives in a row", zip_of(kTwo, {.zip64_end = false}) + zip_of(kTwo, {.zip64_end = false}),
       "expected to end at byte"},
      {"absurdly many entries", zip_of(kTwo, {.count = std::uint64_t{1} << 60}), "contradict each other"},
      {"absurdly many entries, agreed", zip_of(kTwo, {.count = (std::uint64_t{1} << 60) | 0xffff}), "claims"},
      {"one entry more", zip_of(kTwo, {.count = 3}), "f: "},
      {"one entry less", zip_of(kTwo, {.count = 1}),
       "bytes in its central directory that belong to no entry"},
      {"directory at 0", zip_of(kTwo, {.directory_offset = 0}), "expected to end at byte"},
      {"directory beyond the file", zip_of(kTwo, {.directory_offset = 0xfffffff0}),
       "expected to end at byte"},
  };
  for (const auto& odd : cases) {
    SCOPED_TRACE(odd.what);
    EXPECT_MESSAGE(read(odd.content), odd.message);
  }
}

// A first central directory, complete but not the one that the end record names.
TEST(Zip, RefusesASecondCentralDirectory) {
  const std::string first = zip_of(kTwo, {.zip64_end = false});
  const std::string entries = zip_of(kTwo, {.zip64_end = false}).substr(0, first.find("PK\x01\x02"));
  const std::string directory = first.substr(entries.size());
  EXPECT_MESSAGE(read(zip_of(kTwo, {.zip64_end = false, .gap = directory})), "expected a data descriptor");
}

TEST(Zip, TorchNeedsExactlyOnePickle) {
  const auto parse = [](const std::vector<ZipEntry>& entries) {
    const Memory memory(zip_of(entries));
    return parse_torch_bin(memory.bytes, memory.owner, "f");
  };
  EXPECT_TRUE(parse({{.name = "any/data.pkl", .data = "\x80\x02}."}}).empty());
  EXPECT_MESSAGE(parse({{.name = "a/b/data.pkl", .data = "\x80\x02}."}}), "without <name>/data.pkl");
  EXPECT_MESSAGE(parse({{.name = "data.pkl", .data = "\x80\x02}."}}), "without <name>/data.pkl");
  EXPECT_MESSAGE(
      parse({{.name = "a/data.pkl", .data = "\x80\x02}."}, {.name = "b/data.pkl", .data = "\x80\x02}."}}),
      "two entries <name>/data.pkl");
  EXPECT_MESSAGE(
      parse({{.name = "a/data.pkl", .data = "\x80\x02}."}, {.name = "a/byteorder", .data = "big"}}),
      "has byte order \"big\", expected little");
}

}  // namespace
}  // namespace krait::io
