// The state_dict that torch.load(weights_only=True) reads back: a pickle of protocol 2 that names nothing but
// dictionaries, torch's storages and torch._utils._rebuild_tensor_v2.
#include <map>

#include "io/layout.h"
#include "io/zip_writer.h"
#include "krait/core/error.h"
#include "krait/io/torch_bin.h"

namespace krait::io {
namespace {

std::string storage_type(DType dtype, const std::string& name) {
  switch (dtype) {
    case DType::f32: return "FloatStorage";
    case DType::f64: return "DoubleStorage";
    case DType::f16: return "HalfStorage";
    case DType::bf16: return "BFloat16Storage";
    case DType::i64: return "LongStorage";
    case DType::i32: return "IntStorage";
    case DType::i16: return "ShortStorage";
    case DType::i8: return "CharStorage";
    case DType::u8: return "ByteStorage";
    case DType::boolean: return "BoolStorage";
    case DType::c64: return "ComplexFloatStorage";
    case DType::c128: return "ComplexDoubleStorage";
  }
  fail(ErrorKind::invalid_argument, "tensor ", name, " has a dtype that torch has no storage for");
}

// Opcodes, by their names in Python's pickletools.
namespace op {

std::string binunicode(std::string_view text) {
  return "X" + raw(static_cast<std::uint32_t>(text.size())) + std::string(text);
}
std::string integer(std::int64_t value) {
  if (value >= 0 && value < 256) return "K" + raw(static_cast<std::uint8_t>(value));          // BININT1
  if (value >= 0 && value <= 0x7fffffff) return "J" + raw(static_cast<std::int32_t>(value));  // BININT
  return std::string("\x8a\x08", 2) + raw(value);  // LONG1 of eight bytes
}
std::string global(std::string_view module, std::string_view name) {
  return concat("c", module, "\n", name, "\n");
}
std::string tuple(const std::vector<std::string>& items) {
  std::string out = "(";
  for (const auto& item : items) out += item;
  return out + "t";
}
std::string integers(const Dims& values) {
  std::string out = "(";
  for (const std::int64_t value : values) out += integer(value);
  return out + "t";
}

}  // namespace op

// One tensor, which fills storage `key` from its beginning.
std::string describe(const std::string& name, const Tensor& t, std::size_t key) {
  const std::string storage =
      op::tuple({op::binunicode("storage"), op::global("torch", storage_type(t.dtype(), name)),
                 op::binunicode(std::to_string(key)), op::binunicode("cpu"), op::integer(t.numel())}) +
      "Q";  // BINPERSID
  const std::string no_hooks = op::global("collections", "OrderedDict") + ")R";
  return op::global("torch._utils", "_rebuild_tensor_v2") +
         op::tuple({storage, op::integer(0), op::integers(t.shape()),
                    op::integers(contiguous_strides(t.shape())), "\x89", no_hooks}) +
         "R";
}

}  // namespace

void write_torch_bin(const std::filesystem::path& path, const TensorMap& tensors) {
  // Tensors that are one and the same are stored once: a tied head is tied in the file.
  std::vector<Tensor> storages;
  std::map<std::pair<const void*, std::int64_t>, std::size_t> keys;
  std::string pickle = "\x80\x02}(";
  for (const auto& [name, tensor] : tensors) {
    const auto [at, is_new] = keys.try_emplace({tensor.raw(), tensor.numel()}, storages.size());
    const bool shared = !is_new && storages[at->second].dtype() == tensor.dtype() &&
                        storages[at->second].shape() == tensor.shape() && tensor.is_contiguous();
    const std::size_t key = shared ? at->second : storages.size();
    if (!shared) storages.push_back(tensor);
    pickle += op::binunicode(name) + describe(name, tensor, key);
  }
  pickle += "u.";

  AtomicFile file(path);
  ZipWriter zip(file);
  const std::string root = path.stem().string() + "/";
  zip.add(root + "data.pkl", pickle);
  zip.add(root + "byteorder", "little");
  for (std::size_t key = 0; key < storages.size(); ++key) {
    const Tensor flat = storages[key].contiguous();
    zip.add(root + "data/" + std::to_string(key), {static_cast<const std::byte*>(flat.raw()), flat.nbytes()});
  }
  zip.add(root + "version", "3\n");
  zip.finish();
  file.commit();
}

}  // namespace krait::io
