#include "krait/io/safetensors.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>

#include "io/scratch.h"
#include "krait/io/mapped_file.h"

namespace krait::io {
namespace {

std::string file_with(const std::string& header, const std::string& data) {
  return raw(std::uint64_t{header.size()}) + header + data;
}

TensorMap parse(const std::string& content, Metadata* metadata = nullptr) {
  const Memory memory(content);
  return parse_safetensors(memory.bytes, memory.owner, "f", metadata);
}

constexpr const char* kTwo =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
    R"("b":{"dtype":"I16","shape":[1,2],"data_offsets":[8,12]}})";
const std::string kTwoData = raw(std::vector<float>{1.5F, -2.0F}) + raw(std::vector<std::int16_t>{7, -8});

TEST(Safetensors, ReadsTensorsAndMetadata) {
  Metadata metadata;
  const TensorMap tensors = parse(file_with(kTwo, kTwoData), &metadata);
  ASSERT_EQ(tensors.size(), 2U);
  EXPECT_EQ(values_of<float>(tensors.at("a")), (std::vector<float>{1.5F, -2.0F}));
  EXPECT_EQ(tensors.at("b").shape(), (Dims{1, 2}));
  EXPECT_EQ(values_of<std::int16_t>(tensors.at("b")), (std::vector<std::int16_t>{7, -8}));
  EXPECT_EQ(metadata, (Metadata{{"format", "pt"}}));
  EXPECT_TRUE(parse(file_with("{}", "")).empty());
}

TEST(Safetensors, ReadsAtAnyAlignment) {
  const std::string content = file_with(kTwo, kTwoData);
  for (std::size_t shift = 0; shift < 8; ++shift) {
    SCOPED_TRACE(shift);
    const Memory memory(content, shift);
    const TensorMap tensors = parse_safetensors(memory.bytes, memory.owner, "f");
    EXPECT_EQ(values_of<float>(tensors.at("a"))[1], -2.0F);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(tensors.at("a").raw()) % 4, 0U);
  }
}

TEST(Safetensors, GoldenFilesAreMapped) {
  for (const char* model : {"hf-mamba-tiny", "hf-mamba2-tiny", "hf-gptneox-tiny"}) {
    SCOPED_TRACE(model);
    const auto path = std::filesystem::path(KRAIT_GOLDEN_DIR) / model / "model.safetensors";
    const auto file = MappedFile::open(path);
    const TensorMap tensors = parse_safetensors(file->bytes(), file, path.string());
    EXPECT_GT(tensors.size(), 20U);
    const auto* begin = file->bytes().data();
    for (const auto& [name, tensor] : tensors) {
      const auto* data = static_cast<const std::byte*>(tensor.raw());
      EXPECT_TRUE(data >= begin && data < begin + file->bytes().size()) << name << " was copied";
    }
  }
}

TEST(Safetensors, TensorsKeepTheMapping) {
  const Scratch scratch;
  Tensor a;
  {
    TensorMap tensors = read_safetensors(scratch.put("f", file_with(kTwo, kTwoData)));
    a = tensors.at("a");
  }
  std::filesystem::remove(scratch / "f");
  EXPECT_EQ(values_of<float>(a)[0], 1.5F);
}

TEST(Safetensors, WritesEveryTypeAndReadsItBack) {
  const Scratch scratch;
  TensorMap tensors;
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i8, DType::u8, DType::i16,
                            DType::i32, DType::i64, DType::boolean, DType::c64}) {
    Tensor t = Tensor::empty({3, 5}, dtype);
    for (std::int64_t i = 0; i < 3; ++i) t.select(0, i).fill(static_cast<double>(i % 2));
    tensors.emplace(concat("t.", dtype), t);
    tensors.emplace(concat("transposed.", dtype), t.transpose(0, 1));
  }
  tensors.emplace("scalar", Tensor::zeros({}));
  tensors.emplace("nothing", Tensor::zeros({4, 0}));
  tensors.emplace("\"quoted\"\n\u00e9", Tensor::zeros({1}));
  const Metadata metadata{{"format", "pt"}, {"a \"b\"", "c\\d"}};
  write_safetensors(scratch / "f", tensors, metadata);

  Metadata metadata_back;
  const TensorMap back = read_safetensors(scratch / "f", &metadata_back);
  EXPECT_EQ(metadata_back, metadata);
  ASSERT_EQ(back.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    SCOPED_TRACE(name);
    const Tensor& read = back.at(name);
    EXPECT_EQ(read.dtype(), tensor.dtype());
    EXPECT_EQ(read.shape(), tensor.shape());
    EXPECT_EQ(std::memcmp(read.raw(), tensor.contiguous().raw(), tensor.nbytes()), 0);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(read.raw()) % size_of(read.dtype()), 0U);
  }
  // The same tensors, the same bytes; and data from a multiple of 64 bytes on.
  write_safetensors(scratch / "g", back, metadata);
  const std::string content = content_of(scratch / "f");
  EXPECT_EQ(content, content_of(scratch / "g"));
  std::uint64_t length = 0;
  std::memcpy(&length, content.data(), sizeof length);
  EXPECT_EQ((8 + length) % 64, 0U);
}

TEST(Safetensors, ReplacesTheFileItReads) {
  const Scratch scratch;
  write_safetensors(scratch / "f", {{"a", Tensor::from<float>({1, 2, 3})}});
  const TensorMap old = read_safetensors(scratch / "f");
  write_safetensors(scratch / "f", {{"b", old.at("a")}});
  EXPECT_EQ(values_of<float>(read_safetensors(scratch / "f").at("b")), (std::vector<float>{1, 2, 3}));
  EXPECT_EQ(values_of<float>(old.at("a")), (std::vector<float>{1, 2, 3}));
}

TEST(Safetensors, RefusesToWrite) {
  const Scratch scratch;
  const auto write = [&](const std::string& name, const Tensor& tensor) {
    write_safetensors(scratch / "f", {{name, tensor}});
    return 0;
  };
  EXPECT_MESSAGE(write("a", Tensor()), "tensor \"a\" is absent");
  EXPECT_MESSAGE(write("a", Tensor::zeros({1}, DType::c128)), "dtype c128, which safetensors does not have");
  EXPECT_MESSAGE(write("__metadata__", Tensor::zeros({1})), "this name is reserved");
  EXPECT_MESSAGE(write("\xff", Tensor::zeros({1})), "is not valid UTF-8");
  EXPECT_EQ(scratch.count(), 0U);
}

TEST(Safetensors, RefusesEveryTruncation) {
  const std::string content = file_with(kTwo, kTwoData);
  for (std::size_t size = 0; size < content.size(); ++size) {
    SCOPED_TRACE(size);
    EXPECT_MESSAGE(parse(content.substr(0, size)), "f: ");
  }
  EXPECT_MESSAGE(parse(content + '\0'), "has 13 bytes of data, expected 12");
}

TEST(Safetensors, RefusesLiesAboutTheHeader) {
  for (const std::uint64_t length : {std::uint64_t{3}, std::uint64_t{100}, std::uint64_t{1} << 32,
                                     std::uint64_t{1} << 63, ~std::uint64_t{0}, ~std::uint64_t{0} - 7}) {
    SCOPED_TRACE(length);
    EXPECT_MESSAGE(parse(raw(length) + "{}"), "claims a header of");
  }
  EXPECT_MESSAGE(parse(raw(std::uint64_t{1}) + "{}"), "is not JSON");
  EXPECT_MESSAGE(parse(file_with("", "")), "is not JSON");
  EXPECT_MESSAGE(parse(file_with("[]", "")), "is not a JSON object");
  EXPECT_MESSAGE(parse(file_with("{} x", "")), "is not JSON: unexpected text at byte 4");
  EXPECT_MESSAGE(parse(file_with(std::string("{\"\xff\":1}"), "")), "is not JSON");
  EXPECT_MESSAGE(parse(file_with(R"({"a":1e999})", "")), "is not JSON: a number is out of range");
  EXPECT_MESSAGE(parse(file_with(std::string(1 << 20, '['), "")), "nested deeper than 3 levels");
  EXPECT_MESSAGE(parse(file_with(R"({"__metadata__":[]})", "")), "__metadata__ is not an object");
  EXPECT_MESSAGE(parse(file_with(R"({"__metadata__":{"a":1}})", "")), "value for \"a\" that is not text");
}

TEST(Safetensors, RefusesDuplicates) {
  const std::string entry = R"({"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  EXPECT_MESSAGE(parse(file_with(R"({"a":)" + entry + R"(,"a":)" + entry + "}", "x")), "the key \"a\" twice");
  EXPECT_MESSAGE(parse(file_with(R"({"a":)" + entry + R"(,"\u0061":)" + entry + "}", "x")),
                 "the key \"a\" twice");
  EXPECT_MESSAGE(
      parse(file_with(R"({"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})", "x")),
      "the key \"shape\" twice");
  EXPECT_MESSAGE(parse(file_with(R"({"__metadata__":{"a":"1","a":"2"}})", "")), "the key \"a\" twice");
}

// Entries of one tensor "a" over eight bytes of data.
TEST(Safetensors, RefusesLiesAboutTensors) {
  const auto one = [](const std::string& entry) {
    return parse(file_with("{\"a\":" + entry + "}", "01234567"));
  };
  EXPECT_TRUE(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})").contains("a"));
  const struct {
    const char* entry;
    const char* message;
  } cases[] = {
      {R"([])", "not described by exactly dtype, shape and data_offsets"},
      {R"({"dtype":"F32","shape":[2]})", "not described by exactly"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1})", "not described by exactly"},
      {R"({"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]})", "has dtype \"F8_E4M3\", expected F64"},
      {R"({"dtype":3,"shape":[2],"data_offsets":[0,8]})", "dtype that is not text"},
      {R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})", "shape that is not a list"},
      {R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})", "not a whole number from 0"},
      {R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})", "not a whole number from 0"},
      {R"({"dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8]})", "not a whole number from 0"},
      {R"({"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]})", "not a whole number from 0"},
      {R"({"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]})", "has 9 dimensions"},
      {R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})", "fewer than 2^63 bytes"},
      {R"({"dtype":"F32","shape":[2305843009213693952],"data_offsets":[0,8]})", "fewer than 2^63 bytes"},
      {R"({"dtype":"F32","shape":[0,9223372036854775807,9223372036854775807],"data_offsets":[0,0]})",
       "fewer than 2^63 bytes"},
      {R"({"dtype":"F32","shape":[1],"data_offsets":[0,8]})",
       "takes 8 bytes, expected 4 for shape (1,) of f32"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})", "not a begin and an end"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,8]})", "not a begin and an end"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[8,16]})", "ends at byte 16 of the data, which has 8"},
      {R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})", "begins at byte 4 of the data, expected 0"},
      {R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", "has 8 bytes of data, expected 4"},
      {R"({"dtype":"F32","shape":[2],"data_offsets":[9223372036854775800,9223372036854775807]})",
       "takes 7 bytes, expected 8"},
      {R"({"dtype":"BOOL","shape":[8],"data_offsets":[0,8]})", "has boolean 0 stored as 48, expected 0 or 1"},
  };
  for (const auto& odd : cases) {
    SCOPED_TRACE(odd.entry);
    EXPECT_MESSAGE(one(odd.entry), odd.message);
  }
  EXPECT_MESSAGE(parse(file_with(R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},)"
                                 R"("b":{"dtype":"U8","shape":[5],"data_offsets":[3,8]}})",
                                 "01234567")),
                 "expected 5: tensors follow each other without overlap");
}

}  // namespace
}  // namespace krait::io
