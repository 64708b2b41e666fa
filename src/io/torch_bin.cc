#include "krait/io/torch_bin.h"

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "io/layout.h"
#include "io/pickle.h"
#include "io/text.h"
#include "io/zip.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"

namespace krait::io {
namespace {

using Value = Pickle::Value;
using Kind = Pickle::Kind;

constexpr std::string_view kTensor = "torch._utils _rebuild_tensor";
constexpr std::string_view kTensorV2 = "torch._utils _rebuild_tensor_v2";
constexpr std::string_view kTensorV3 = "torch._utils _rebuild_tensor_v3";
constexpr std::string_view kParameter = "torch._utils _rebuild_parameter";
constexpr std::string_view kParameterWithState = "torch._utils _rebuild_parameter_with_state";

// A dtype and the names of its storage and of itself in torch.
struct TypeNames {
  DType dtype;
  std::string_view storage;
  std::string_view name;
};
constexpr std::array<TypeNames, 12> kTypes{{
    {DType::f32, "torch FloatStorage", "torch float32"},
    {DType::f64, "torch DoubleStorage", "torch float64"},
    {DType::f16, "torch HalfStorage", "torch float16"},
    {DType::bf16, "torch BFloat16Storage", "torch bfloat16"},
    {DType::i64, "torch LongStorage", "torch int64"},
    {DType::i32, "torch IntStorage", "torch int32"},
    {DType::i16, "torch ShortStorage", "torch int16"},
    {DType::i8, "torch CharStorage", "torch int8"},
    {DType::u8, "torch ByteStorage", "torch uint8"},
    {DType::boolean, "torch BoolStorage", "torch bool"},
    {DType::c64, "torch ComplexFloatStorage", "torch complex64"},
    {DType::c128, "torch ComplexDoubleStorage", "torch complex128"},
}};
constexpr std::array<std::string_view, 2> kUntyped{"torch.storage UntypedStorage", "torch UntypedStorage"};

// Every name that a file may use: the above, and two that appear in the configuration beside tensors.
constexpr auto kGlobals = [] {
  std::array<std::string_view, 2 * kTypes.size() + kUntyped.size() + 7> names{
      kTensor, kTensorV2, kTensorV3, kParameter, kParameterWithState, "torch Size", "torch device"};
  std::size_t at = 7;
  for (const TypeNames& type : kTypes) {
    names[at++] = type.storage;
    names[at++] = type.name;
  }
  for (const auto name : kUntyped) names[at++] = name;
  return names;
}();

// The first bytes of the format before PyTorch 1.6: a pickle of its magic number.
constexpr std::string_view kLegacyMagic("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15);

class TorchFile {
 public:
  TorchFile(std::span<const std::byte> bytes, std::shared_ptr<void> owner, const std::string& file)
      : file_(file),
        owner_(std::move(owner)),
        zip_(bytes, file),
        prefix_(find_prefix()),
        pickle_(open_pickle()) {}

  TensorMap tensors() {
    const Value& dict = state_dict();
    TensorMap tensors;
    std::set<std::string_view> keys;
    for (std::size_t i = 0; i < dict.items.size(); i += 2) {
      const Value& key = pickle_[dict.items[i]];
      if (key.kind != Kind::text) continue;
      const std::string what = concat(file_, ": tensor ", printable(key.text));
      require(keys.insert(key.text).second, what, " is there twice");
      if (auto tensor = tensor_from(pickle_[dict.items[i + 1]], what)) tensors.emplace(key.text, *tensor);
    }
    require(!tensors.empty() || dict.items.empty(), file_,
            ": has no tensors, expected a dict of them, or one under the key state_dict or model");
    return tensors;
  }

 private:
  // Bytes that were found usable as elements of `dtype`.
  struct Storage {
    Bytes bytes;
    DType dtype;
  };

  std::string find_prefix() const {
    constexpr std::string_view kName = "/data.pkl";
    std::optional<std::string> prefix;
    for (const auto& [name, data] : zip_.entries()) {
      if (!name.ends_with(kName) || name.find('/') != name.size() - kName.size()) continue;
      require(!prefix, file_, ": has two entries <name>/data.pkl, expected one");
      prefix = name.substr(0, name.size() - kName.size() + 1);
    }
    require(prefix.has_value(), file_,
            ": is a zip archive without <name>/data.pkl, expected what torch.save writes");
    if (const auto* order = zip_.find(*prefix + "byteorder"))
      require(text_of(*order) == "little", file_, ": has byte order ", printable(text_of(*order)),
              ", expected little");
    return *prefix;
  }

  Pickle open_pickle() const { return {*zip_.find(prefix_ + "data.pkl"), kGlobals, file_ + ": data.pkl"}; }

  const Value& state_dict() const {
    const Value& root = pickle_[pickle_.root()];
    require(root.kind == Kind::dict, file_, ": holds an object that is no dict, expected a dict of tensors");
    for (const std::string_view wanted : {"state_dict", "model"})
      for (std::size_t i = 0; i < root.items.size(); i += 2)
        if (const Value& key = pickle_[root.items[i]]; key.kind == Kind::text && key.text == wanted)
          if (const Value& inner = pickle_[root.items[i + 1]]; inner.kind == Kind::dict) return inner;
    return root;
  }

  // Nothing where the value is no tensor.
  std::optional<Tensor> tensor_from(const Value& value, const std::string& what) {
    const Value* called = &value;
    // A parameter wraps a tensor. More than a few wraps are no parameter's.
    for (int wraps = 0; called->kind == Kind::call; ++wraps) {
      const std::string_view callee = pickle_[called->items[0]].text;
      const auto& arguments = pickle_[called->items[1]].items;
      if (callee == kTensor || callee == kTensorV2 || callee == kTensorV3)
        return rebuild(callee, arguments, what);
      if (callee != kParameter && callee != kParameterWithState) return std::nullopt;
      require(!arguments.empty() && wraps < 4, what, " is a parameter without a tensor");
      called = &pickle_[arguments[0]];
    }
    return std::nullopt;
  }

  // _rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks, metadata=None);
  // the oldest form has the first four, the third a dtype before metadata.
  Tensor rebuild(std::string_view callee, std::span<const Pickle::Id> arguments, const std::string& what) {
    const std::size_t fewest = callee == kTensor ? 4 : callee == kTensorV2 ? 6 : 7;
    require(arguments.size() >= fewest && arguments.size() <= fewest + 1, what, " is described by ",
            arguments.size(), " arguments, expected ", fewest);
    if (arguments.size() > fewest) {
      // It marks tensors whose elements are still to be conjugated or negated.
      const Value& metadata = pickle_[arguments[fewest]];
      require(metadata.kind == Kind::none || (metadata.kind == Kind::dict && metadata.items.empty()), what,
              " has metadata that changes its elements, expected none");
    }
    const auto own_dtype =
        callee == kTensorV3 ? std::optional(dtype_from(pickle_[arguments[6]], what)) : std::nullopt;
    const Storage& storage = storage_from(pickle_[arguments[0]], own_dtype, what);
    const DType dtype = storage.dtype;
    const Value& offset = pickle_[arguments[1]];
    require(offset.kind == Kind::integer && offset.integer >= 0, what,
            " has a storage offset that is not a whole number from 0 to 2^63 - 1");
    const Dims shape = dims_from(pickle_[arguments[2]], "size", what);
    Dims strides = dims_from(pickle_[arguments[3]], "stride", what);
    require(shape.size() == strides.size(), what, " has shape ", shape, " but strides ", strides);
    (void)checked_nbytes(shape, dtype, what);  // nothing below overflows

    // The last element, counted from the start of the storage.
    const auto available = static_cast<std::int64_t>(storage.bytes.data.size() / size_of(dtype));
    const std::int64_t count = numel_of(shape);
    std::int64_t last = offset.integer;
    const Dims row_major = contiguous_strides(shape);
    for (int i = 0; i < shape.size(); ++i) {
      require(strides[i] >= 0, what, " has strides ", strides, ", expected none below 0");
      // The stride of a dimension of one element means nothing and may be any number.
      if (shape[i] <= 1 || count == 0) {
        strides[i] = row_major[i];
        continue;
      }
      std::int64_t reach = 0;
      require(!__builtin_mul_overflow(shape[i] - 1, strides[i], &reach) &&
                  !__builtin_add_overflow(last, reach, &last),
              what, " has strides ", strides, ", which reach outside of its storage");
    }
    require(count == 0 || last < available, what, " of shape ", shape, " with strides ", strides,
            " at offset ", offset.integer, " needs ", last, " + 1 elements, but its storage has ", available);
    Bytes bytes = storage.bytes;
    if (count != 0)
      bytes.data = bytes.data.subspan(static_cast<std::size_t>(offset.integer) * size_of(dtype));
    return view_of(bytes, shape, strides, dtype);
  }

  // A persistent value is ("storage", type of the storage, key, device, number of elements). The type
  // says what an element is unless the tensor does (`own_dtype`).
  const Storage& storage_from(const Value& value, std::optional<DType> own_dtype, const std::string& what) {
    require(value.kind == Kind::persistent, what, " is not backed by a storage");
    const Value& id = pickle_[value.items[0]];
    require(id.kind == Kind::tuple && id.items.size() == 5 && pickle_[id.items[0]].text == "storage" &&
                pickle_[id.items[1]].kind == Kind::global && pickle_[id.items[2]].kind == Kind::text &&
                pickle_[id.items[4]].kind == Kind::integer,
            what, " has a storage that is not (\"storage\", type, key, device, count)");
    const std::string_view key = pickle_[id.items[2]].text;
    const std::string_view type = pickle_[id.items[1]].text;
    const std::int64_t count = pickle_[id.items[4]].integer;
    const auto* known =
        std::find_if(kTypes.begin(), kTypes.end(), [&](auto& t) { return t.storage == type; });
    const bool untyped = std::find(kUntyped.begin(), kUntyped.end(), type) != kUntyped.end();
    require(known != kTypes.end() || untyped, what, " has a storage of type ", printable(type),
            ", expected one of torch's storages");
    // Untyped storages count bytes.
    const auto element = static_cast<std::int64_t>(untyped ? 1 : size_of(known->dtype));
    const DType dtype = own_dtype.value_or(untyped ? DType::u8 : known->dtype);

    const auto* entry = zip_.find(concat(prefix_, "data/", key));
    require(entry != nullptr, what, " is in storage ", printable(key), ", which the file does not have");
    std::int64_t expected = 0;
    require(count >= 0 && !__builtin_mul_overflow(count, element, &expected) &&
                static_cast<std::size_t>(expected) == entry->size(),
            what, " is in storage ", printable(key), " of ", count, " elements of ", element,
            " bytes, but that has ", entry->size(), " bytes");

    const auto known_storage = storages_.find({key, dtype});
    if (known_storage != storages_.end()) return known_storage->second;
    const Bytes bytes =
        usable_as({.data = *entry, .owner = owner_}, dtype, concat(file_, ": storage ", printable(key)));
    return storages_.emplace(std::pair(key, dtype), Storage{bytes, dtype}).first->second;
  }

  DType dtype_from(const Value& value, const std::string& what) const {
    const auto* known =
        std::find_if(kTypes.begin(), kTypes.end(), [&](auto& t) { return t.name == value.text; });
    require(value.kind == Kind::global && known != kTypes.end(), what, " has an unknown dtype");
    return known->dtype;
  }

  // A tuple of whole numbers, or torch.Size of one.
  Dims dims_from(const Value& value, const char* field, const std::string& what) const {
    const bool is_size = value.kind == Kind::call && pickle_[value.items[0]].text == "torch Size" &&
                         pickle_[value.items[1]].items.size() == 1;
    const Value& tuple = is_size ? pickle_[pickle_[value.items[1]].items[0]] : value;
    require(tuple.kind == Kind::tuple, what, " has a ", field, " that is not a tuple");
    std::vector<std::int64_t> numbers;
    for (const Pickle::Id item : tuple.items) {
      require(pickle_[item].kind == Kind::integer, what, " has a ", field,
              " with an item that is not a whole number");
      numbers.push_back(pickle_[item].integer);
    }
    return checked_dims(numbers, what);
  }

  const std::string& file_;
  std::shared_ptr<void> owner_;
  ZipArchive zip_;
  std::string prefix_;
  Pickle pickle_;
  std::map<std::pair<std::string_view, DType>, Storage> storages_;
};

}  // namespace

TensorMap parse_torch_bin(std::span<const std::byte> bytes, std::shared_ptr<void> owner,
                          const std::string& name) {
  require(!text_of(bytes).starts_with(kLegacyMagic), name,
          ": is in the format of torch.save before PyTorch 1.6, expected its zip format; convert it once "
          "with: python3 -c 'import sys, torch; f = sys.argv[1]; torch.save(torch.load(f, "
          "map_location=\"cpu\", weights_only=True), f)' FILE");
  return TorchFile(bytes, std::move(owner), name).tensors();
}

TensorMap read_torch_bin(const std::filesystem::path& path) {
  const auto file = MappedFile::open(path);
  return parse_torch_bin(file->bytes(), file, path.string());
}

}  // namespace krait::io
