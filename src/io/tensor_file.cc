#include "krait/io/tensor_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "io/json.h"
#include "io/layout.h"
#include "io/text.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"
#include "krait/io/safetensors.h"
#include "krait/io/torch_bin.h"

namespace krait::io {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kIndexEnd = ".index.json";
constexpr std::size_t kMaxIndex = 100'000'000;  // far above any: a tensor takes some 100 bytes
constexpr std::array<std::string_view, 4> kCandidates{"model.safetensors", "model.safetensors.index.json",
                                                      "pytorch_model.bin", "pytorch_model.bin.index.json"};

bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." &&
         std::none_of(name.begin(), name.end(), [](char c) { return c == '/' || c == '\\' || c == '\0'; });
}

TensorMap read_shards(const fs::path& index) {
  const std::string what = index.string();
  const auto file = MappedFile::open(index);
  require(file->bytes().size() <= kMaxIndex, what, ": has ", file->bytes().size(),
          " bytes, expected at most ", kMaxIndex);
  const nlohmann::json root = parse_json(file->text(), 16, what + ": the index");
  require(root.is_object() && root.contains("weight_map") && root["weight_map"].is_object(), what,
          ": the index has no object \"weight_map\"");
  std::map<std::string, std::vector<std::string>> tensors_of_shard;
  for (const auto& [tensor, shard] : root["weight_map"].items()) {
    require(shard.is_string() && is_plain_file_name(shard.get_ref<const std::string&>()), what, ": tensor ",
            printable(tensor), " is in ",
            shard.is_string() ? printable(shard.get_ref<const std::string&>()) : "no file",
            ", expected the name of a file beside the index");
    tensors_of_shard[shard.get_ref<const std::string&>()].push_back(tensor);
  }
  TensorMap tensors;
  for (const auto& [shard, names] : tensors_of_shard) {
    TensorMap found = read_tensor_file(index.parent_path() / shard);
    for (const std::string& name : names) {
      auto node = found.extract(name);
      require(!node.empty(), what, ": tensor ", printable(name), " is not in ", printable(shard),
              ", where the index has it");
      tensors.insert(std::move(node));
    }
  }
  return tensors;
}

// True for a link whose target is missing as well: opening it then says so.
bool has_entry(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(path, ignored));
}

}  // namespace

TensorMap read_tensor_file(const fs::path& path) {
  const auto file = MappedFile::open(path);
  const std::string_view text = file->text();
  // A zip or pickle cannot have '{' there, and every safetensors header has.
  if (text.size() > 8 && text[8] == '{') return parse_safetensors(file->bytes(), file, path.string());
  if (text.starts_with("PK") || text.starts_with("\x80"))
    return parse_torch_bin(file->bytes(), file, path.string());
  require(!text.starts_with("version https://git-lfs"), path.string(),
          ": is a pointer of Git LFS, expected the file that it stands for; fetch it with: git lfs pull");
  fail(ErrorKind::invalid_argument, path.string(), ": begins with ", printable(text.substr(0, 8)),
       ", expected a safetensors file or what torch.save writes");
}

TensorMap read_checkpoint(const fs::path& path) {
  std::error_code ignored;
  fs::path file = path;
  if (fs::is_directory(path, ignored)) {
    const auto* found = std::find_if(kCandidates.begin(), kCandidates.end(),
                                     [&](std::string_view name) { return has_entry(path / name); });
    if (found == kCandidates.end()) {
      std::string names;
      for (const auto name : kCandidates) names += concat(names.empty() ? "" : ", ", name);
      fail(ErrorKind::not_found, path.string(), ": has no checkpoint, expected one of ", names);
    }
    file = path / *found;
  }
  return file.filename().string().ends_with(kIndexEnd) ? read_shards(file) : read_tensor_file(file);
}

void prefetch(const TensorMap& tensors) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  for (const auto& [name, tensor] : tensors) {
    if (tensor.numel() == 0 || tensor.device() != Device{}) continue;
    std::int64_t last = 0;
    for (int i = 0; i < tensor.ndim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.raw());
    const std::uintptr_t begin = address / page * page;
    const std::uintptr_t end = address + (static_cast<std::size_t>(last) + 1) * size_of(tensor.dtype());
    // Only a hint: whether the system takes it changes no result.
    ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
  }
}

}  // namespace krait::io
