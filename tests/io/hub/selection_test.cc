#include "io/hub/selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "io/scratch.h"

namespace krait::hub {
namespace {

Weights choose(const std::set<std::string, std::less<>>& files) {
  return choose_weights([&](std::string_view file) { return files.contains(file); });
}

TEST(HubSelection, PrefersWholeSafetensors) {
  std::set<std::string, std::less<>> files = {"model.safetensors", "model.safetensors.index.json",
                                              "pytorch_model.bin", "pytorch_model.bin.index.json"};
  EXPECT_EQ(choose(files).file, "model.safetensors");
  EXPECT_FALSE(choose(files).sharded);
  files.erase("model.safetensors");
  EXPECT_EQ(choose(files).file, "model.safetensors.index.json");
  EXPECT_TRUE(choose(files).sharded);
  files.erase("model.safetensors.index.json");
  EXPECT_EQ(choose(files).file, "pytorch_model.bin");
  EXPECT_FALSE(choose(files).sharded);
  files.erase("pytorch_model.bin");
  EXPECT_EQ(choose(files).file, "pytorch_model.bin.index.json");
  EXPECT_TRUE(choose(files).sharded);
  EXPECT_EQ(choose({"model.gguf", "model-00001-of-00002.safetensors"}).file, "");
}

TEST(HubSelection, ShardsOfAnIndex) {
  const auto shards = shards_of(R"({"metadata": {"total_size": 3},
      "weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}})",
                                "index");
  EXPECT_EQ(shards, (std::vector<std::string>{"m-1.safetensors", "m-2.safetensors"}));
}

TEST(HubSelection, RefusesBadIndices) {
  EXPECT_MESSAGE(shards_of("", "x/index"), "x/index");
  EXPECT_MESSAGE(shards_of("[]", "x/index"), "x/index: has no weight_map");
  EXPECT_MESSAGE(shards_of("{}", "x/index"), "has no weight_map");
  EXPECT_MESSAGE(shards_of(R"({"weight_map": {}})", "x/index"), "has no weight_map");
  EXPECT_MESSAGE(shards_of(R"({"weight_map": ["a"]})", "x/index"), "has no weight_map");
  EXPECT_MESSAGE(shards_of(R"({"weight_map": {"a": 1}})", "x/index"), "the shard of \"a\" is not a name");
  EXPECT_MESSAGE(shards_of(R"({"weight_map": {"a": "../../etc/passwd"}})", "x/index"),
                 "names the shard \"../../etc/passwd\"");
  EXPECT_MESSAGE(shards_of(R"({"weight_map": {"a": "/etc/passwd"}})", "x/index"),
                 "names the shard \"/etc/passwd\"");
  EXPECT_MESSAGE(shards_of(R"({"weight_map": {"a": "x\u0000y"}})", "x/index"), "names the shard \"x\\x00y\"");
  EXPECT_MESSAGE(shards_of(std::string(100'000, '['), "x/index"), "x/index");
}

}  // namespace
}  // namespace krait::hub
