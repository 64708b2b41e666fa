#include "krait/io/npy.h"

#include <gtest/gtest.h>

#include <numeric>

#include "io/scratch.h"
#include "krait/io/mapped_file.h"

namespace krait::io {
namespace {

std::string npy(const std::string& header, const std::string& data, int version = 1) {
  const std::string length = version == 1 ? raw(static_cast<std::uint16_t>(header.size()))
                                          : raw(static_cast<std::uint32_t>(header.size()));
  return concat("\x93NUMPY", static_cast<char>(version), '\0', length, header, data);
}

std::string header_of(const std::string& descr, const std::string& shape, const char* fortran = "False") {
  return "{'descr': '" + descr + "', 'fortran_order': " + fortran + ", 'shape': " + shape + ", }\n";
}

Tensor parse(const std::string& content, std::size_t misalign = 0) {
  const Memory memory(content, misalign);
  return parse_npy(memory.bytes, memory.owner, "f");
}

const std::string kSix = raw(std::vector<float>{0, 1, 2, 3, 4, 5});

TEST(Npy, ReadsEveryVersionAtAnyAlignment) {
  for (const int version : {1, 2, 3})
    for (std::size_t misalign = 0; misalign < 8; ++misalign) {
      SCOPED_TRACE(concat("version ", version, ", address ", misalign));
      const Tensor t = parse(npy(header_of("<f4", "(2, 3)"), kSix, version), misalign);
      EXPECT_EQ(t.shape(), (Dims{2, 3}));
      EXPECT_EQ(values_of<float>(t), (std::vector<float>{0, 1, 2, 3, 4, 5}));
    }
}

TEST(Npy, HonoursFortranOrder) {
  const Tensor t = parse(npy(header_of("<f4", "(2, 3)", "True"), kSix));
  EXPECT_EQ(values_of<float>(t), (std::vector<float>{0, 2, 4, 1, 3, 5}));
}

TEST(Npy, ReadsWhateverPythonMayWrite) {
  EXPECT_EQ(parse(npy(header_of("<f4", "()"), raw(2.5F))).ndim(), 0);
  EXPECT_EQ(parse(npy(header_of("<f4", "(6,)"), kSix)).shape(), (Dims{6}));
  EXPECT_EQ(parse(npy(header_of("<f4", "(0, 3)"), "")).numel(), 0);
  EXPECT_EQ(parse(npy("{\"shape\":(6,),\"fortran_order\":False,\"descr\":\"<f4\"}", kSix)).numel(), 6);
  EXPECT_EQ(parse(npy(header_of("|V2", "(1,)"), "ab")).dtype(), DType::bf16);
  EXPECT_EQ(parse(npy(header_of(">i1", "(1,)"), "a")).dtype(), DType::i8);
  EXPECT_EQ(parse(npy(header_of("=f4", "(6,)"), kSix)).dtype(), DType::f32);
}

TEST(Npy, WidensUnsignedIntegers) {
  const Tensor t = parse(npy(header_of("<u2", "(3,)"), raw(std::vector<std::uint16_t>{0, 50277, 65535})));
  EXPECT_EQ(values_of<std::int64_t>(t), (std::vector<std::int64_t>{0, 50277, 65535}));
  const Tensor wide = parse(npy(header_of("<u4", "(2,)"), raw(std::vector<std::uint32_t>{7, 0xffffffffU})));
  EXPECT_EQ(values_of<std::int64_t>(wide), (std::vector<std::int64_t>{7, 0xffffffffLL}));
  EXPECT_EQ(values_of<std::int64_t>(parse(npy(header_of("<u8", "(1,)"), raw(std::uint64_t{9})))),
            (std::vector<std::int64_t>{9}));
  EXPECT_THROW(parse(npy(header_of("<u8", "(1,)"), raw(~std::uint64_t{0}))), Error);
}

TEST(Npy, WritesEveryTypeAndReadsItBack) {
  const Scratch scratch;
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i8, DType::u8, DType::i16,
                            DType::i32, DType::i64, DType::boolean, DType::c64, DType::c128})
    for (const Dims& shape : {Dims{}, Dims{1}, Dims{3, 0, 2}, Dims{2, 3}, Dims{1, 2, 1, 2, 1, 2, 1, 2}}) {
      SCOPED_TRACE(concat(dtype, " ", shape));
      Tensor t = Tensor::empty(shape, dtype);
      t.fill(1);
      if (t.ndim() > 1) t = t.transpose(0, 1);
      if (t.numel() > 1) t.select(0, 0).fill(0);
      write_npy(scratch / "f", t);
      const Tensor back = read_npy(scratch / "f");
      EXPECT_EQ(back.dtype(), dtype);
      EXPECT_EQ(back.shape(), t.shape());
      EXPECT_EQ(std::memcmp(back.raw(), t.contiguous().raw(), t.nbytes()), 0);
      EXPECT_EQ((content_of(scratch / "f").size() - t.nbytes()) % 64, 0U);
    }
  EXPECT_EQ(scratch.count(), 1U);
}

TEST(Npy, WritesWhatNumPyWrites) {
  const Scratch scratch;
  const auto golden = std::filesystem::path(KRAIT_GOLDEN_DIR) / "mamba2-tiny";
  for (const char* name : {"logits.npy", "input_ids.npy"}) {
    SCOPED_TRACE(name);
    write_npy(scratch / name, read_npy(golden / name));
    EXPECT_EQ(content_of(scratch / name), content_of(golden / name));
  }
}

TEST(Npy, ReadsEveryGoldenFile) {
  int count = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(KRAIT_GOLDEN_DIR)) {
    if (entry.path().extension() != ".npy") continue;
    SCOPED_TRACE(entry.path());
    EXPECT_GT(read_npy(entry.path()).numel(), 0);
    ++count;
  }
  EXPECT_GT(count, 50);
}

TEST(Npy, RefusesToWrite) {
  const Scratch scratch;
  EXPECT_MESSAGE((write_npy(scratch / "f", Tensor()), 0), "the tensor is absent");
  EXPECT_MESSAGE((write_npy(scratch / "no/f", Tensor::zeros({1})), 0), "cannot be created");
  EXPECT_EQ(scratch.count(), 0U);
}

TEST(Npy, RefusesEveryTruncation) {
  for (const int version : {1, 2}) {
    const std::string content = npy(header_of("<f4", "(2, 3)"), kSix, version);
    for (std::size_t size = 0; size < content.size(); ++size) {
      SCOPED_TRACE(size);
      EXPECT_MESSAGE(parse(content.substr(0, size)), "f: ");
    }
    EXPECT_MESSAGE(parse(content + "x"), "has 25 bytes of elements, expected 24 for shape (2, 3) of f32");
  }
  const std::string header = header_of("<f4", "(2, 3)");
  for (std::size_t size = 0; size + 2 < header.size(); ++size) {
    SCOPED_TRACE(size);
    EXPECT_MESSAGE(parse(npy(header.substr(0, size), kSix)), "f: ");
  }
}

TEST(Npy, RefusesOddHeaders) {
  const struct {
    std::string header;
    const char* message;
  } cases[] = {
      {header_of(">f4", "(6,)"), "has big-endian elements (\">f4\")"},
      {header_of(">V2", "(12,)"), "has big-endian elements (\">V2\")"},
      {header_of("<u3", "(6,)"), "has elements of type \"<u3\", expected"},
      {header_of("<f16", "(6,)"), "has elements of type \"<f16\""},
      {header_of("<U6", "(1,)"), "has elements of type \"<U6\""},
      {header_of("|O", "(1,)"), "has elements of type \"|O\""},
      {header_of("f4", "(6,)"), "has elements of type \"f4\""},
      {header_of("", "(6,)"), "has elements of type \"\""},
      {header_of("\x1b[2J", "(6,)"), "\"\\x1b[2J\""},
      {"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6,), }", "has elements with fields"},
      {header_of("<f4", "(6,)", "false"), "neither True nor False"},
      {header_of("<f4", "(-6,)"), "expected no negative size"},
      {header_of("<f4", "(6.0,)"), "damaged header: no )"},
      {header_of("<f4", "6"), "damaged header: no ("},
      {header_of("<f4", "(,)"), "no whole number"},
      {header_of("<f4", "(9223372036854775808,)"), "no whole number below 2^63"},
      {header_of("<f4", "(9223372036854775807,)"), "fewer than 2^63 bytes"},
      {header_of("<f4", "(4294967296, 4294967296)"), "fewer than 2^63 bytes"},
      {header_of("<f4", "(0, 9223372036854775807, 4)"), "fewer than 2^63 bytes"},
      {header_of("<f4", "(1, 1, 1, 1, 1, 1, 1, 1, 6)"), "has 9 dimensions"},
      {header_of("<f4", "(1000000000000,)"), "has 24 bytes of elements, expected 4000000000000"},
      {header_of("<f4", "(6,)") + "x", "text after the header"},
      {"{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (6,)}", "unknown or there twice"},
      {"{'descr': '<f4', 'fortran_order': False, 'shape': (6,), 'x': 1}", "the key \"x\", which is unknown"},
      {"{'descr': '<f4', 'shape': (6,)}", "without descr, fortran_order or shape"},
      {"{'descr': '<f4' 'shape': (6,)}", "damaged header: no }"},
      {"{descr: '<f4'}", "no text in quotation marks"},
      {"{'descr", "no text in quotation marks"},
      {"__import__('os')", "damaged header: no {"},
      {std::string(60000, '('), "damaged header: no {"},
      {"", "damaged header"},
      {header_of("|b1", "(24,)"), "has boolean 6 stored as 128"},
  };
  for (const auto& odd : cases) {
    SCOPED_TRACE(odd.header.substr(0, 80));
    EXPECT_MESSAGE(parse(npy(odd.header, kSix)), odd.message);
  }
  EXPECT_MESSAGE(parse(npy(header_of("<f4", "(6,)"), kSix, 4)), "has version 4 of the .npy format");
  EXPECT_MESSAGE(parse("\x93NUMPX\x01\x02\x03\x04"), "does not begin as a .npy file does");
  EXPECT_MESSAGE(parse("\x93NUMPY\x02" + std::string(1, '\0') + "\xff\xff\xff\xff{}"),
                 "claims a header of 4294967295");
}

}  // namespace
}  // namespace krait::io
