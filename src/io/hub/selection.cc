#include "io/hub/selection.h"

#include <nlohmann/json.hpp>
#include <set>

#include "io/hub/names.h"
#include "io/json.h"
#include "io/text.h"
#include "krait/core/error.h"

namespace krait::hub {

std::vector<std::string_view> optional_files(Parts parts) {
  if (parts == Parts::tokenizer) return {"tokenizer_config.json", "special_tokens_map.json"};
  return {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"};
}

std::string_view required_file(Parts parts) {
  return parts == Parts::tokenizer ? "tokenizer.json" : "config.json";
}

Weights choose_weights(const Has& has) {
  constexpr std::array<std::string_view, 4> kByPreference = {
      "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
      "pytorch_model.bin.index.json"};
  for (const std::string_view file : kByPreference)
    if (has(file)) return {.file = std::string(file), .sharded = file.ends_with(".index.json")};
  return {};
}

std::vector<std::string> shards_of(std::string_view index, const std::string& what) {
  constexpr int kDepth = 16;
  const nlohmann::json json = io::parse_json(index, kDepth, what);
  const auto map = json.find("weight_map");
  require(json.is_object() && map != json.end() && map->is_object() && !map->empty(), what,
          ": has no weight_map, which names the shard of each tensor");
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : map->items()) {
    require(shard.is_string(), what, ": the shard of ", io::printable(tensor), " is not a name");
    const auto& name = shard.get_ref<const std::string&>();
    require(is_safe_file_name(name), what, ": names the shard ", io::printable(name),
            ", which is not a file below the model's directory");
    shards.insert(name);
  }
  return {shards.begin(), shards.end()};
}

}  // namespace krait::hub
