#include "krait/io/torch_bin.h"

#include <gtest/gtest.h>

#include <array>
#include <numeric>

#include "io/scratch.h"
#include "io/torch_writer.h"
#include "krait/io/mapped_file.h"

namespace krait::io {
namespace {

using pickled::TensorSpec;

TensorMap parse(const std::string& content, std::size_t misalign = 0) {
  const Memory memory(content, misalign);
  return parse_torch_bin(memory.bytes, memory.owner, "f");
}

TensorMap parse_pickle(const std::string& pickle, const std::vector<std::string>& storages) {
  return parse(zip_of(torch_entries(pickle, storages)));
}

// A state_dict of one tensor "a" over one storage.
TensorMap parse_one(const std::string& tensor, const std::string& storage) {
  return parse_pickle(pickled::program(pickled::dict({{"a", tensor}})), {storage});
}

std::string six_floats() {
  std::vector<float> values(6);
  std::iota(values.begin(), values.end(), 0.0F);
  return raw(values);
}

TEST(TorchBin, ReadsAStateDict) {
  const TensorMap tensors = parse_one(pickled::tensor({}), six_floats());
  ASSERT_EQ(tensors.size(), 1U);
  EXPECT_EQ(tensors.at("a").shape(), (Dims{2, 3}));
  EXPECT_EQ(values_of<float>(tensors.at("a")), (std::vector<float>{0, 1, 2, 3, 4, 5}));
}

TEST(TorchBin, HonoursStridesAndOffsets) {
  const auto a =
      parse_one(pickled::tensor({.offset = 1, .shape = {2, 2}, .strides = {1, 3}}), six_floats()).at("a");
  EXPECT_EQ(values_of<float>(a), (std::vector<float>{1, 4, 2, 5}));
  // An expanded tensor repeats an element.
  const auto b =
      parse_one(pickled::tensor({.offset = 5, .shape = {3, 2}, .strides = {0, 0}}), six_floats()).at("a");
  EXPECT_EQ(values_of<float>(b), (std::vector<float>{5, 5, 5, 5, 5, 5}));
  // The stride of a size of 1 means nothing, however large.
  const auto c =
      parse_one(pickled::tensor({.shape = {1, 6}, .strides = {std::int64_t{1} << 62, 1}}), six_floats());
  EXPECT_TRUE(c.at("a").is_contiguous());
  const auto d = parse_one(pickled::tensor({.offset = 99, .shape = {0, 6}, .strides = {6, 1}}), six_floats());
  EXPECT_EQ(d.at("a").numel(), 0);
  const auto e = parse_one(pickled::tensor({.offset = 2, .shape = {}, .strides = {}}), six_floats());
  EXPECT_EQ(values_of<float>(e.at("a")), (std::vector<float>{2}));
}

TEST(TorchBin, TensorsShareTheirStorage) {
  const std::string pickle = pickled::program(pickled::dict(
      {{"a", pickled::tensor({})}, {"b", pickled::tensor({.offset = 3, .shape = {3}, .strides = {1}})}}));
  for (const std::size_t misalign : {0, 1}) {
    const TensorMap tensors = parse(zip_of(torch_entries(pickle, {six_floats()})), misalign);
    EXPECT_EQ(tensors.at("a").data<float>() + 3, tensors.at("b").data<float>());
  }
}

TEST(TorchBin, ReadsEveryType) {
  const struct {
    const char* storage;
    const char* name;
    DType dtype;
  } types[] = {{"FloatStorage", "float32", DType::f32},
               {"DoubleStorage", "float64", DType::f64},
               {"HalfStorage", "float16", DType::f16},
               {"BFloat16Storage", "bfloat16", DType::bf16},
               {"LongStorage", "int64", DType::i64},
               {"IntStorage", "int32", DType::i32},
               {"ShortStorage", "int16", DType::i16},
               {"CharStorage", "int8", DType::i8},
               {"ByteStorage", "uint8", DType::u8},
               {"BoolStorage", "bool", DType::boolean},
               {"ComplexFloatStorage", "complex64", DType::c64},
               {"ComplexDoubleStorage", "complex128", DType::c128}};
  for (const auto& [storage, name, dtype] : types) {
    SCOPED_TRACE(storage);
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    Tensor expected = Tensor::empty({2, 3}, dtype);
    expected.fill(1);
    const std::string bytes(static_cast<const char*>(expected.raw()), expected.nbytes());
    const Tensor typed = parse_one(pickled::tensor({.type = storage}), bytes).at("a");
    EXPECT_EQ(typed.dtype(), dtype);
    EXPECT_EQ(std::memcmp(typed.raw(), expected.raw(), expected.nbytes()), 0);
    // The form with an untyped storage counts bytes and names the dtype beside it.
    const TensorSpec spec{.type = "UntypedStorage", .count = 6 * size, .module = "torch.storage"};
    const std::string untyped = pickled::call(
        pickled::global("torch._utils", "_rebuild_tensor_v3"),
        {pickled::storage(spec), pickled::integer(0), pickled::integers({2, 3}), pickled::integers({3, 1}),
         "\x89", pickled::no_hooks(), pickled::global("torch", name)});
    const Tensor read = parse_one(untyped, bytes).at("a");
    EXPECT_EQ(read.dtype(), dtype);
    EXPECT_EQ(std::memcmp(read.raw(), expected.raw(), expected.nbytes()), 0);
  }
}

TEST(TorchBin, ReadsParametersAndWrappedStateDicts) {
  const std::string parameter = pickled::call(pickled::global("torch._utils", "_rebuild_parameter"),
                                              {pickled::tensor({}), "\x88", pickled::no_hooks()});
  const std::string inner = pickled::dict({{"a", parameter}});
  for (const char* key : {"state_dict", "model"}) {
    SCOPED_TRACE(key);
    const std::string outer = pickled::dict({{"epoch", pickled::integer(3)},
                                             {"note", pickled::text("x")},
                                             {"rate", "G12345678"},
                                             {"seed", std::string("\x8a\x10", 2) + std::string(16, 'x')},
                                             {"names", "](" + pickled::text("b") + "e"},
                                             {key, inner}});
    EXPECT_EQ(parse_pickle(pickled::program(outer), {six_floats()}).count("a"), 1U);
  }
  // Beside tensors, values of other kinds are left out.
  const std::string mixed = pickled::dict({{"step", pickled::integer(3)}, {"a", parameter}, {"none", "N"}});
  EXPECT_EQ(parse_pickle(pickled::program(mixed), {six_floats()}).size(), 1U);
  EXPECT_TRUE(parse_pickle(pickled::program("}"), {}).empty());
  const std::string size = pickled::call(pickled::global("torch", "Size"), {pickled::integers({6})});
  const std::string sized =
      pickled::call(pickled::global("torch._utils", "_rebuild_tensor"),
                    {pickled::storage({}), pickled::integer(0), size, pickled::integers({1})});
  EXPECT_EQ(parse_one(sized, six_floats()).at("a").shape(), (Dims{6}));
}

// What a module's state_dict() is: an OrderedDict with the attribute _metadata.
TEST(TorchBin, IgnoresMetadata) {
  const std::string state = pickled::dict({{"_metadata", pickled::no_hooks()}});
  const std::string dict =
      pickled::no_hooks() + "(" + pickled::text("a") + pickled::tensor({}) + "u" + state + "b";
  EXPECT_EQ(parse_pickle(pickled::program(dict), {six_floats()}).count("a"), 1U);
}

// Protocol 4: frames, short text, STACK_GLOBAL, MEMOIZE.
TEST(TorchBin, ReadsProtocol4) {
  const auto text = [](std::string_view value) {
    return "\x8c" + std::string(1, static_cast<char>(value.size())) + std::string(value) + "\x94";
  };
  const auto global = [&](std::string_view module, std::string_view name) {
    return text(module) + text(name) + "\x93\x94";
  };
  const std::string storage =
      "(" + text("storage") + global("torch", "FloatStorage") + text("0") + text("cpu") + "K\x06t\x94Q";
  const std::string tensor = global("torch._utils", "_rebuild_tensor_v2") + "(" + storage +
                             std::string("K\x00K\x02K\x03\x86\x94K\x03K\x01\x86\x94\x89", 15) +
                             global("collections", "OrderedDict") + ")R\x94t\x94R\x94";
  const std::string body = "}\x94" + text("a") + tensor + "s.";
  const std::string pickle = "\x80\x04\x95" + raw(std::uint64_t{body.size()}) + body;
  EXPECT_EQ(values_of<float>(parse_pickle(pickle, {six_floats()}).at("a")).back(), 5.0F);
}

TEST(TorchBin, GoldenFilesAreMapped) {
  for (const char* model :
       {"mamba1-tiny", "mamba2-tiny", "mamba2attn-tiny", "shakespeare", "transformerpp-tiny"}) {
    SCOPED_TRACE(model);
    const auto path = std::filesystem::path(KRAIT_GOLDEN_DIR) / model / "pytorch_model.bin";
    const auto file = MappedFile::open(path);
    const TensorMap tensors = parse_torch_bin(file->bytes(), file, path.string());
    EXPECT_GT(tensors.size(), 20U);
    const auto* begin = file->bytes().data();
    for (const auto& [name, tensor] : tensors) {
      const auto* data = static_cast<const std::byte*>(tensor.raw());
      EXPECT_TRUE(data >= begin && data < begin + file->bytes().size()) << name << " was copied";
    }
    // Tied, and saved as one storage.
    if (tensors.contains("lm_head.weight")) {
      EXPECT_EQ(tensors.at("lm_head.weight").raw(), tensors.at("backbone.embedding.weight").raw());
    }
  }
}

TEST(TorchBin, RefusesEveryTruncation) {
  const std::string content =
      zip_of(torch_entries(pickled::program(pickled::dict({{"a", pickled::tensor({})}})), {six_floats()}));
  EXPECT_EQ(parse(content).size(), 1U);
  for (std::size_t size = 0; size < content.size(); ++size) {
    SCOPED_TRACE(size);
    EXPECT_MESSAGE(parse(content.substr(0, size)), "f: ");
  }
}

TEST(TorchBin, RefusesEveryTruncatedPickle) {
  const std::string pickle = pickled::program(pickled::dict({{"a", pickled::tensor({})}}));
  for (std::size_t size = 0; size < pickle.size(); ++size) {
    SCOPED_TRACE(size);
    EXPECT_MESSAGE(parse_pickle(pickle.substr(0, size), {six_floats()}), "f: data.pkl ");
  }
  EXPECT_MESSAGE(parse_pickle(pickle + "N", {six_floats()}), "goes on for 1 bytes after its end");
}

// Whatever one byte is changed to: tensors or an error, and never a read outside of the file.
TEST(TorchBin, SurvivesEveryChangedByte) {
  const std::string content =
      zip_of(torch_entries(pickled::program(pickled::dict({{"a", pickled::tensor({})}})), {six_floats()}));
  int refused = 0;
  for (std::size_t at = 0; at < content.size(); ++at)
    for (const char value : {'\x00', '\x01', '\x7f', '\x80', '\xff'}) {
      std::string changed = content;
      changed[at] = value;
      try {
        for (const auto& [name, tensor] : parse(changed)) (void)tensor.clone();
      } catch (const Error&) {
        ++refused;
      }
    }
  EXPECT_GT(refused, 1000);
}

TEST(TorchBin, NamesTheOldFormat) {
  const std::string magic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.", 21);
  EXPECT_MESSAGE(parse(magic), "before PyTorch 1.6");
  EXPECT_MESSAGE(parse(magic), "torch.save(torch.load(");
}

TEST(TorchBin, ExecutesNothing) {
  const Scratch scratch;
  const std::string run = pickled::text(concat("touch ", (scratch / "was-here").string()));
  const std::string system = pickled::global("os", "system");
  const std::string size = pickled::global("torch", "Size");
  const struct {
    const char* what;
    std::string value;
    const char* message;
  } cases[] = {
      {"GLOBAL", system, "asks for \"os.system\", which"},
      {"GLOBAL REDUCE", pickled::call(system, {run}), "asks for \"os.system\""},
      {"GLOBAL of builtins", pickled::call(pickled::global("builtins", "eval"), {run}), "\"builtins.eval\""},
      {"GLOBAL of Python 2", pickled::call(pickled::global("__builtin__", "eval"), {run}),
       "\"__builtin__.eval\""},
      {"GLOBAL of torch", pickled::global("torch", "load"), "\"torch.load\""},
      {"GLOBAL that begins as an allowed one", pickled::global("torch", "FloatStorage.from_file"),
       "\"torch.FloatStorage.from_file\""},
      {"GLOBAL with a space for the newline", pickled::global("torch FloatStorage", ""), "asks for"},
      {"GLOBAL with a control character", pickled::global("o\x1b[2Js", "system"), "o\\x1b[2Js.system"},
      {"STACK_GLOBAL", pickled::text("posix") + pickled::text("system") + "\x93",
       "asks for \"posix.system\""},
      {"STACK_GLOBAL of a number", "K\x01K\x02\x93", "looks up a name that is not text"},
      {"INST", "(" + run + "ios\nsystem\n", "asks for \"os.system\""},
      {"INST of an allowed name", "(itorch\nSize\n", "has opcode INST"},
      {"OBJ", "(" + size + run + "o", "has opcode OBJ"},
      {"NEWOBJ", size + ")\x81", "has opcode NEWOBJ "},
      {"NEWOBJ_EX", size + ")}\x92", "has opcode NEWOBJ_EX"},
      {"EXT1", "\x82\x01", "has opcode EXT"},
      {"EXT2", std::string("\x83\x01\x00", 3), "has opcode EXT"},
      {"EXT4", std::string("\x84\x01\x00\x00\x00", 5), "has opcode EXT"},
      {"PERSID", "Psomewhere\n", "has opcode PERSID"},
      {"REDUCE of text", run + "(tR", "calls something that is not a name"},
      {"REDUCE without a tuple", size + "]R", "calls something that is not a name"},
      {"REDUCE of a call", pickled::call(pickled::call(size, {}), {run}),
       "calls something that is not a name"},
      {"OrderedDict of arguments", pickled::call(pickled::global("collections", "OrderedDict"), {run}),
       "makes an OrderedDict with arguments"},
      {"BUILD of a call", pickled::call(size, {}) + "}b", "sets the state of an object"},
      {"BUILD with a tuple", pickled::no_hooks() + "(N}tb", "sets the state of an object"},
      {"a buffer out of band", "\x97", "has opcode 151 at byte"},
      {"a number in text", "I1\n", "has opcode 73 at byte"},
  };
  for (const auto& odd : cases) {
    SCOPED_TRACE(odd.what);
    EXPECT_MESSAGE(parse_one(odd.value, six_floats()), odd.message);
  }
  EXPECT_EQ(scratch.count(), 0U);
}

TEST(TorchBin, RefusesDamagedPickles) {
  const struct {
    const char* what;
    std::string pickle;
    const char* message;
  } cases[] = {
      {"protocol 6", "\x80\x06}.", "has protocol 6, expected 2 to 5"},
      {"protocol 0", std::string("\x80\x00}.", 4), "has protocol 0"},
      {"nothing", "\x80\x02.", "takes a value from an empty stack"},
      {"left over", "\x80\x02}}.", "values left over"},
      {"open group", "\x80\x02(}.", "values left over"},
      {"beneath a mark", "\x80\x02}(0N0s.", "takes a value from an empty stack"},
      {"pop through a mark", "\x80\x02}(a.", "takes a value from an empty stack"},
      {"no group", "\x80\x02t.", "closes a group that was not opened"},
      {"key without value", "\x80\x02}(Nu.", "a key without a value"},
      {"key without value in DICT", "\x80\x02(Nd.", "a key without a value"},
      {"append to a dict", "\x80\x02}Na.", "that is no list"},
      {"set in a list", "\x80\x02]NNs.", "that is no dict"},
      {"memo", "\x80\x02h\x07.", "refers to value 7, which it has not stored"},
      {"long memo", std::string("\x80\x02j\xff\xff\xff\xff.", 8), "refers to value 4294967295"},
      {"absurd text", std::string("\x80\x02X\xff\xff\xff\xff.", 8), "4294967295 more bytes expected, 1 left"},
      {"absurd text of 64 bits", "\x80\x04\x8d" + std::string(8, '\xff') + ".",
       "18446744073709551615 more bytes"},
      {"absurd frame", "\x80\x04\x95" + std::string(8, '\xff') + "}.",
       "a frame of 18446744073709551615 bytes"},
      {"absurd number", std::string("\x80\x02\x8b\xff\xff\xff\xff.", 8), "4294967295 more bytes expected"},
      {"name without an end",
       "\x80\x02"
       "ctorch",
       "cut short in a name"},
      {"not a dict", "\x80\x02].", "holds an object that is no dict"},
      {"no tensors", pickled::program(pickled::dict({{"a", "N"}})), "has no tensors, expected"},
      {"nested far away",
       pickled::program(pickled::dict({{"net", pickled::dict({{"a", pickled::tensor({})}})}})),
       "has no tensors, expected"},
      {"twice", pickled::program(pickled::dict({{"a", pickled::tensor({})}, {"a", pickled::tensor({})}})),
       "tensor \"a\" is there twice"},
  };
  for (const auto& odd : cases) {
    SCOPED_TRACE(odd.what);
    EXPECT_MESSAGE(parse_pickle(odd.pickle, {six_floats()}), odd.message);
  }
  // A memo number says nothing about how much is stored.
  EXPECT_TRUE(parse_pickle(std::string("\x80\x02}r\xff\xff\xff\xff.", 9), {}).empty());
}

TEST(TorchBin, BoundsDepthAndSize) {
  std::string deep = "\x80\x02";
  for (int i = 0; i < 1'000'000; ++i) deep += ']';
  deep += std::string(999'999, 'a') + ".";
  EXPECT_MESSAGE(parse_pickle(deep, {}), "holds an object that is no dict");
  // A list in itself.
  EXPECT_MESSAGE(parse_pickle(std::string("\x80\x02]q\x00h\x00"
                                          "a.",
                                          9),
                              {}),
                 "is no dict");
  std::string parameters = "\x80\x02}" + pickled::text("a");
  for (int i = 0; i < 1000; ++i) parameters += pickled::global("torch._utils", "_rebuild_parameter");
  parameters += "N";
  for (int i = 0; i < 1000; ++i) parameters += "\x85R";
  EXPECT_MESSAGE(parse_pickle(parameters + "s.", {}), "tensor \"a\" is a parameter without a tensor");
  EXPECT_MESSAGE(parse_pickle("\x80\x02" + std::string((1 << 22) + 1, ']'), {}),
                 "has more than 4194304 values");
  EXPECT_MESSAGE(parse_pickle("\x80\x02" + std::string((1 << 22) + 1, 'N'), {}), "values on its stack");
  EXPECT_MESSAGE(parse_pickle("\x80\x02" + std::string((1 << 22) + 1, '('), {}), "4194304 open groups");
  EXPECT_MESSAGE(parse_pickle("\x80\x02N" + std::string((1 << 22) + 1, '\x94'), {}), "4194304 values stored");
  EXPECT_MESSAGE(parse_pickle(std::string((std::size_t{64} << 20) + 1, 'N'), {}),
                 "expected at most 67108864");
}

TEST(TorchBin, RefusesLiesAboutTensors) {
  const auto max = std::numeric_limits<std::int64_t>::max();
  const struct {
    TensorSpec spec;
    const char* message;
  } cases[] = {
      {{.offset = 1}, "needs 6 + 1 elements, but its storage has 6"},
      {{.offset = -1}, "storage offset that is not a whole number from 0"},
      {{.offset = max}, "reach outside of its storage"},
      {{.shape = {7}, .strides = {1}}, "its storage has 6"},
      {{.strides = {4, 1}}, "with strides (4, 1) at offset 0 needs 6 + 1 elements"},
      {{.strides = {-3, 1}}, "expected none below 0"},
      {{.strides = {max, max}}, "reach outside of its storage"},
      {{.shape = {3, 2}, .strides = {max / 2, 1}}, "its storage has 6"},
      {{.shape = {-2, 3}}, "expected no negative size"},
      {{.shape = {-2, -3}}, "expected no negative size"},
      {{.shape = {1LL << 32, 1LL << 32}, .strides = {0, 0}}, "fewer than 2^63 bytes"},
      {{.shape = {0, max, max}, .strides = {1, 1, 1}}, "fewer than 2^63 bytes"},
      {{.shape = {6}}, "has shape (6,) but strides (3, 1)"},
      {{.shape = {1, 1, 1, 1, 1, 1, 1, 1, 1}, .strides = {1, 1, 1, 1, 1, 1, 1, 1, 1}}, "has 9 dimensions"},
      {{.count = 5}, "of 5 elements of 4 bytes, but that has 24 bytes"},
      {{.count = 7}, "of 7 elements of 4 bytes, but that has 24 bytes"},
      {{.count = -6}, "of -6 elements"},
      {{.count = max}, "but that has 24 bytes"},
      {{.count = (1LL << 62) + 6}, "but that has 24 bytes"},
      {{.type = "DoubleStorage"}, "of 6 elements of 8 bytes"},
      {{.type = "Size"}, "storage of type \"torch Size\", expected one of torch's storages"},
      {{.type = "QInt8Storage"}, "asks for \"torch.QInt8Storage\""},
      {{.key = "1"}, "is in storage \"1\", which the file does not have"},
      {{.key = "../data.pkl"}, "which the file does not have"},
      {{.key = ""}, "which the file does not have"},
      {{.type = "BoolStorage", .count = 24}, "storage \"0\" has boolean 6 stored as 128, expected 0 or 1"},
  };
  for (const auto& odd : cases) {
    SCOPED_TRACE(odd.message);
    EXPECT_MESSAGE(parse_one(pickled::tensor(odd.spec), six_floats()), odd.message);
  }
}

TEST(TorchBin, RefusesOddDescriptionsOfTensors) {
  const std::string rebuild = pickled::global("torch._utils", "_rebuild_tensor_v2");
  const std::string zero = pickled::integer(0);
  const std::string six = pickled::integers({6});
  const std::string one = pickled::integers({1});
  const auto with = [&](const std::vector<std::string>& arguments) {
    return pickled::call(rebuild, arguments);
  };
  const std::string storage = pickled::storage({});
  const struct {
    std::string value;
    const char* message;
  } cases[] = {
      {with({}), "is described by 0 arguments, expected 6"},
      {with({storage, zero, six, one}), "is described by 4 arguments"},
      {with({storage, zero, six, one, "N", "N", "N", "N"}), "is described by 8 arguments"},
      {with({storage, zero, six, one, "N", "N", pickled::dict({{"neg", "\x88"}})}), "metadata that changes"},
      {with({"N", zero, six, one, "N", "N"}), "is not backed by a storage"},
      {with({"NQ", zero, six, one, "N", "N"}), "is not (\"storage\", type, key, device, count)"},
      {with({")Q", zero, six, one, "N", "N"}), "is not (\"storage\", type, key, device, count)"},
      {with({storage, "N", six, one, "N", "N"}), "storage offset that is not a whole number"},
      {with({storage, zero, zero, one, "N", "N"}), "a size that is not a tuple"},
      {with({storage, zero, six, "]", "N", "N"}), "a stride that is not a tuple"},
      {with({storage, zero, pickled::tuple({"N"}), one, "N", "N"}),
       "a size with an item that is not a whole number"},
      {with({storage, zero, pickled::tuple({std::string("\x8a\x09", 2) + std::string(9, '\x01')}), one, "N",
             "N"}),
       "a size with an item that is not a whole number"},
  };
  for (const auto& odd : cases) {
    SCOPED_TRACE(odd.message);
    EXPECT_MESSAGE(parse_one(odd.value, six_floats()), odd.message);
  }
}

}  // namespace
}  // namespace krait::io
