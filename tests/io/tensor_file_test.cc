#include "krait/io/tensor_file.h"

#include <gtest/gtest.h>

#include "io/scratch.h"
#include "io/torch_writer.h"
#include "krait/io/safetensors.h"

namespace krait::io {
namespace {

Tensor numbers(float first) { return Tensor::from<float>({first, first + 1}); }

// A torch file with one tensor "a" of one element.
std::string torch_file(float value) {
  const std::string tensor = pickled::tensor({.count = 1, .shape = {1}, .strides = {1}});
  return zip_of(torch_entries(pickled::program(pickled::dict({{"a", tensor}})), {raw(value)}));
}

float first_of(const TensorMap& tensors, const char* name) { return tensors.at(name).data<float>()[0]; }

TEST(ReadTensorFile, TellsFormatsByContent) {
  const Scratch scratch;
  write_safetensors(scratch / "s.bin", {{"a", numbers(3)}});
  EXPECT_EQ(first_of(read_tensor_file(scratch / "s.bin"), "a"), 3.0F);
  EXPECT_EQ(first_of(read_tensor_file(scratch.put("t.safetensors", torch_file(4))), "a"), 4.0F);
  // A header of 128 bytes begins with the byte that pickles begin with.
  const std::string entry = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})";
  const std::string padded = entry + std::string(128 - entry.size(), ' ');
  EXPECT_EQ(read_tensor_file(scratch.put("p", raw(std::uint64_t{128}) + padded + "x")).size(), 1U);
}

TEST(ReadTensorFile, NamesWhatItCannotRead) {
  const Scratch scratch;
  EXPECT_MESSAGE(read_tensor_file(scratch.put("a", "version https://git-lfs.github.com/spec/v1\n")),
                 "is a pointer of Git LFS");
  EXPECT_MESSAGE(read_tensor_file(scratch.put("b", "<!DOCTYPE html>\n")),
                 "b: begins with \"<!DOCTYP\", expected");
  EXPECT_MESSAGE(read_tensor_file(scratch.put("c", "")), "c: begins with \"\", expected");
  EXPECT_MESSAGE(read_tensor_file(scratch.put("d", "\x80\x02}.")), "does not end as a zip archive does");
}

TEST(ReadCheckpoint, TakesTheFirstOfItsNames) {
  const Scratch scratch;
  EXPECT_MESSAGE(read_checkpoint(scratch.path()),
                 "has no checkpoint, expected one of model.safetensors, model.safetensors.index.json, "
                 "pytorch_model.bin, pytorch_model.bin.index.json");
  scratch.put("pytorch_model.bin.index.json", R"({"weight_map":{"a":"last.bin"}})");
  scratch.put("last.bin", torch_file(4));
  EXPECT_EQ(first_of(read_checkpoint(scratch.path()), "a"), 4.0F);
  scratch.put("pytorch_model.bin", torch_file(3));
  EXPECT_EQ(first_of(read_checkpoint(scratch.path()), "a"), 3.0F);
  scratch.put("model.safetensors.index.json", R"({"weight_map":{"a":"part.safetensors"}})");
  write_safetensors(scratch / "part.safetensors", {{"a", numbers(2)}});
  EXPECT_EQ(first_of(read_checkpoint(scratch.path()), "a"), 2.0F);
  write_safetensors(scratch / "model.safetensors", {{"a", numbers(1)}});
  EXPECT_EQ(first_of(read_checkpoint(scratch.path()), "a"), 1.0F);
  // Any of them, and any other file, may be named directly.
  EXPECT_EQ(first_of(read_checkpoint(scratch / "pytorch_model.bin"), "a"), 3.0F);
  EXPECT_EQ(first_of(read_checkpoint(scratch / "pytorch_model.bin.index.json"), "a"), 4.0F);
  EXPECT_EQ(first_of(read_checkpoint(scratch / "part.safetensors"), "a"), 2.0F);
  EXPECT_MESSAGE(read_checkpoint(scratch / "none"), "none: cannot be opened: No such file");
}

TEST(ReadCheckpoint, ReadsShards) {
  const Scratch scratch;
  write_safetensors(scratch / "1.safetensors",
                    {{"a", numbers(1)}, {"b", numbers(2)}, {"unlisted", numbers(9)}});
  write_safetensors(scratch / "2.safetensors", {{"c", numbers(3)}, {"a", numbers(8)}});
  scratch.put("model.safetensors.index.json",
              R"({"metadata":{"total_size":24},"weight_map":)"
              R"({"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}})");
  const TensorMap tensors = read_checkpoint(scratch.path());
  ASSERT_EQ(tensors.size(), 3U);
  EXPECT_EQ(first_of(tensors, "a"), 1.0F);
  EXPECT_EQ(first_of(tensors, "b"), 2.0F);
  EXPECT_EQ(first_of(tensors, "c"), 3.0F);
  prefetch(tensors);
}

TEST(ReadCheckpoint, RefusesDamagedIndexes) {
  const Scratch scratch;
  write_safetensors(scratch / "1.safetensors", {{"a", numbers(1)}});
  const auto read = [&](const std::string& index) {
    scratch.put("model.safetensors.index.json", index);
    return read_checkpoint(scratch.path());
  };
  EXPECT_MESSAGE(read(R"({"weight_map":{"a":"1.safetensors","b":"1.safetensors"}})"),
                 "index.json: tensor \"b\" is not in \"1.safetensors\", where the index has it");
  EXPECT_MESSAGE(read(R"({"weight_map":{"a":"2.safetensors"}})"),
                 "2.safetensors: cannot be opened: No such file");
  for (const char* name : {"../1.safetensors", "/etc/passwd", "", ".", "..", "sub/1.safetensors", "sub\\\\1",
                           "1.safetensors\\u0000"})
    EXPECT_MESSAGE(read(concat(R"({"weight_map":{"a":")", name, "\"}}")),
                   "expected the name of a file beside");
  EXPECT_MESSAGE(read(R"({"weight_map":{"a":1}})"), "tensor \"a\" is in no file, expected");
  EXPECT_MESSAGE(read(R"({"weight_map":[]})"), "has no object \"weight_map\"");
  EXPECT_MESSAGE(read(R"({})"), "has no object \"weight_map\"");
  EXPECT_MESSAGE(read(R"([])"), "has no object \"weight_map\"");
  EXPECT_MESSAGE(read(""), "is not JSON");
  EXPECT_MESSAGE(read(R"({"weight_map":{"a":"1.safetensors","a":"1.safetensors"}})"), "the key \"a\" twice");
  EXPECT_MESSAGE(read(std::string(1 << 20, '[')), "nested deeper than 16 levels");
}

TEST(ReadCheckpoint, NamesADanglingLink) {
  const Scratch scratch;
  std::filesystem::create_symlink("../blobs/gone", scratch / "model.safetensors");
  scratch.put("pytorch_model.bin", torch_file(3));
  EXPECT_MESSAGE(read_checkpoint(scratch.path()),
                 "model.safetensors: a symbolic link to a file that does not exist");
}

}  // namespace
}  // namespace krait::io
