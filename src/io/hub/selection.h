// Which files of a repository make a model.
#pragma once

#include <array>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "krait/io/hub.h"

namespace krait::hub {

// The files that are fetched where the repository has them.
[[nodiscard]] std::vector<std::string_view> optional_files(Parts parts);
// The one that must be there.
[[nodiscard]] std::string_view required_file(Parts parts);

// Answers whether a file is in the repository, or in a snapshot of it.
using Has = std::function<bool(std::string_view file)>;

struct Weights {
  std::string file;      // model.safetensors, ..., or an index of shards; empty: there are none
  bool sharded = false;  // `file` is an index
};

// model.safetensors before its index before pytorch_model.bin before its index.
[[nodiscard]] Weights choose_weights(const Has& has);

// The different files that an index (the text of model.safetensors.index.json) names, sorted. Throws
// Error(invalid_argument) beginning with `what` where it names none, or one that leaves the directory.
[[nodiscard]] std::vector<std::string> shards_of(std::string_view index, const std::string& what);

}  // namespace krait::hub
