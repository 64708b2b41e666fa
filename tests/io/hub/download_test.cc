// The hub as it should be: what is fetched, where it lands, and what is not asked twice.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <thread>

#include "io/hub/hub_fixture.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;
using HubDownload = HubTest;

std::vector<std::string> names_in(const fs::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    if (!entry.is_directory()) names.push_back(entry.path().lexically_relative(directory).string());
  std::ranges::sort(names);
  return names;
}

TEST_F(HubDownload, LaysTheCacheOutAsHuggingFaceHubDoes) {
  hub_.put_model();
  EXPECT_EQ(get(), snapshot());
  EXPECT_EQ(names_in(snapshot()),
            (std::vector<std::string>{"config.json", "model.safetensors", "tokenizer.json"}));
  for (const char* file : {"config.json", "model.safetensors", "tokenizer.json"}) {
    expect_file(file);
    EXPECT_EQ(fs::read_symlink(snapshot() / file), fs::path("../../blobs") / hub_.file(file).etag);
    EXPECT_TRUE(fs::exists(cache_ / ".locks" / "models--org--name" / (hub_.file(file).etag + ".lock")));
  }
  EXPECT_EQ(names_in(repo_ / "blobs").size(), 3U) << "only complete blobs";
  EXPECT_EQ(io::content_of(repo_ / "refs" / "main"), hub_.commit);
  EXPECT_EQ(names_in(repo_ / ".no_exist" / hub_.commit),
            (std::vector<std::string>{"generation_config.json", "special_tokens_map.json",
                                      "tokenizer_config.json"}));
  EXPECT_EQ(hub_.count("README"), 0);
  EXPECT_EQ(warnings_, std::vector<std::string>{});
}

TEST_F(HubDownload, AsksOnceForAnUnchangedBranchAndNeverForACommit) {
  hub_.put_model();
  get();
  const int before = hub_.count("");
  EXPECT_EQ(get(), snapshot());
  EXPECT_EQ(hub_.count(""), before + 1) << "one question for the branch";
  EXPECT_EQ(get(hub_.commit), snapshot());
  EXPECT_EQ(hub_.count(""), before + 1) << "no question for a commit";
  EXPECT_EQ(find_cached({"org/name", "main"}, options_), snapshot());
  EXPECT_EQ(find_cached({"org/name", hub_.commit}, options_), snapshot());
  EXPECT_EQ(find_cached({"org/name", "other"}, options_), std::nullopt);
  EXPECT_EQ(find_cached({"org/else", "main"}, options_), std::nullopt);
  EXPECT_EQ(hub_.count(""), before + 1) << "looking into the cache asks nothing";
}

TEST_F(HubDownload, FollowsABranch) {
  hub_.put_model();
  get();
  const fs::path old = snapshot();
  hub_.commit = "89abcdef0123456789abcdef0123456789abcdef";
  hub_.put("config.json", R"({"d_model": 8})");
  EXPECT_EQ(get(), snapshot());
  expect_file("config.json");
  EXPECT_EQ(weight_requests().size(), 1U) << "the same weights are not fetched again";
  EXPECT_EQ(io::content_of(repo_ / "refs" / "main"), hub_.commit);
  EXPECT_EQ(io::content_of(old / "config.json"), R"({"d_model": 4})");
}

TEST_F(HubDownload, RevisionsWithSlashes) {
  hub_.put_model();
  EXPECT_EQ(get("refs/pr/1"), snapshot());
  EXPECT_EQ(io::content_of(repo_ / "refs" / "refs" / "pr" / "1"), hub_.commit);
  options_.offline = true;
  EXPECT_EQ(get("refs/pr/1"), snapshot());
}

TEST_F(HubDownload, Shards) {
  hub_.put_model();
  hub_.put("pytorch_model.bin", noise(100), true);
  hub_.put("model.safetensors.index.json",
           R"({"weight_map": {"a": "model-2.safetensors", "b": "sub/model-1.safetensors"}})");
  hub_.put("model-2.safetensors", noise(1000, 2), true);
  hub_.put("sub/model-1.safetensors", noise(2000, 3), true);
  get();
  EXPECT_FALSE(fs::exists(snapshot() / "model.safetensors.index.json")) << "a whole file comes first";

  FakeHub sharded;
  sharded.put("config.json", "{}");
  for (const char* file : {"model.safetensors.index.json", "model-2.safetensors", "sub/model-1.safetensors",
                           "pytorch_model.bin"})
    sharded.put(file, hub_.file(file).content, hub_.file(file).large);
  const io::Scratch scratch;
  Options options = sharded.options(scratch.path());
  std::vector<std::string> complete;
  options.progress = [&](const Progress& progress) {
    EXPECT_LE(progress.bytes_done, progress.bytes_total);
    if (progress.complete) complete.emplace_back(progress.file);
    EXPECT_EQ(progress.files_done, static_cast<int>(complete.size()));
    EXPECT_EQ(progress.files_total, 3);
  };
  const fs::path model = download({"org/name", "main"}, options);
  EXPECT_EQ(complete,
            (std::vector<std::string>{"config.json", "model-2.safetensors", "sub/model-1.safetensors"}));
  EXPECT_EQ(fs::read_symlink(model / "sub/model-1.safetensors"),
            fs::path("../../../blobs") / sharded.file("sub/model-1.safetensors").etag);
  EXPECT_TRUE(io::content_of(model / "sub/model-1.safetensors") == noise(2000, 3));
  EXPECT_EQ(sharded.count("pytorch_model.bin"), 0);

  options.progress = {};
  EXPECT_TRUE(find_cached({"org/name", "main"}, options));
  fs::remove(model / "model-2.safetensors");
  EXPECT_FALSE(find_cached({"org/name", "main"}, options)) << "a shard is missing";
  EXPECT_EQ(download({"org/name", "main"}, options), model);
  EXPECT_EQ(sharded.count("GET /" + sharded.file("model-2.safetensors").etag), 1)
      << "the blob was still there";
}

TEST_F(HubDownload, TheTokenizerAlone) {
  hub_.put_model();
  options_.parts = Parts::tokenizer;
  EXPECT_EQ(get(), snapshot());
  EXPECT_EQ(names_in(snapshot()), (std::vector<std::string>{"tokenizer.json"}));
  EXPECT_TRUE(find_cached({"org/name", "main"}, options_));
  options_.parts = Parts::model;
  EXPECT_FALSE(find_cached({"org/name", "main"}, options_));
  get();
  EXPECT_EQ(names_in(snapshot()).size(), 3U);
}

TEST_F(HubDownload, EmptyFiles) {
  hub_.put_model();
  hub_.put("special_tokens_map.json", "");
  get();
  EXPECT_TRUE(fs::exists(snapshot() / "special_tokens_map.json"));
  expect_file("special_tokens_map.json");
}

TEST_F(HubDownload, ReportsProgress) {
  hub_.put_model(2'000'000);
  std::map<std::string, std::vector<Progress>> reports;
  options_.progress = [&](const Progress& progress) {
    reports[std::string(progress.file)].push_back(progress);
  };
  get();
  ASSERT_EQ(reports.size(), 3U);
  const std::vector<Progress>& weights = reports["model.safetensors"];
  ASSERT_GE(weights.size(), 3U);
  EXPECT_EQ(weights.front().bytes_done, 0U);
  EXPECT_EQ(weights.back().bytes_done, 2'000'000U);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    EXPECT_EQ(weights[i].bytes_total, 2'000'000U);
    EXPECT_EQ(weights[i].files_total, 3);
    EXPECT_EQ(weights[i].complete, i + 1 == weights.size());
    EXPECT_GE(weights[i].bytes_done, weights[i > 0 ? i - 1 : 0].bytes_done);
  }
  EXPECT_EQ(weights.back().files_done, 3) << "weights come last";
}

TEST_F(HubDownload, SendsTheTokenToTheHubOnly) {
  hub_.put_model();
  options_.token = "hf_secret";
  options_.endpoint += "/";  // as some write it
  get();
  int to_the_hub = 0;
  for (const Request& request : hub_.requests("")) {
    const bool to_storage = request.target == "/" + hub_.file("model.safetensors").etag;
    EXPECT_EQ(request.header("authorization"), to_storage ? "" : "Bearer hf_secret") << request.target;
    EXPECT_EQ(request.header("accept-encoding"), "identity");
    EXPECT_FALSE(request.target.starts_with("//")) << request.target;
    to_the_hub += to_storage ? 0 : 1;
  }
  EXPECT_GT(to_the_hub, 3);
  EXPECT_EQ(weight_requests().size(), 1U);
}

TEST_F(HubDownload, ManyThreadsDownloadOnce) {
  hub_.put_model(3'000'000);
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  options_.log = {};
  for (int i = 0; i < 6; ++i)
    threads.emplace_back([&] {
      const fs::path path = get();
      if (io::content_of(path / "model.safetensors") == hub_.file("model.safetensors").content) ++right;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 6);
  EXPECT_EQ(weight_requests().size(), 1U);
  EXPECT_EQ(hub_.count("GET /api/resolve-cache"), 2) << "config.json and tokenizer.json";
}

// Not in the fixture: the second process has to begin before this one has threads.
TEST(HubProcesses, TwoDownloadOnce) {
  const io::Scratch scratch;
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::close(pipe_ends[1]);
    char endpoint[64] = {};
    if (::read(pipe_ends[0], endpoint, sizeof endpoint - 1) <= 0) ::_exit(2);
    try {
      Options options;
      options.endpoint = endpoint;
      options.cache = scratch.path();
      const fs::path path = download({"org/name", "main"}, options);
      ::_exit(fs::file_size(path / "model.safetensors") == 4'000'000 ? 0 : 3);
    } catch (...) {
      ::_exit(1);
    }
  }
  ::close(pipe_ends[0]);
  FakeHub hub;
  hub.put_model(4'000'000);
  // Both are downloading before either gets its first byte.
  std::atomic<int> heads = 0;
  hub.trouble = [&](const Request& request, Connection&, bool&) {
    if (request.method == "HEAD" && request.target.ends_with("model.safetensors")) {
      ++heads;
      for (int i = 0; i < 400 && heads < 2; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  };
  const std::string endpoint = hub.endpoint();
  ASSERT_EQ(::write(pipe_ends[1], endpoint.data(), endpoint.size()), static_cast<ssize_t>(endpoint.size()));
  const fs::path path = download({"org/name", "main"}, hub.options(scratch.path()));
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  ::close(pipe_ends[1]);
  EXPECT_EQ(heads, 2);
  EXPECT_TRUE(io::content_of(path / "model.safetensors") == hub.file("model.safetensors").content);
  EXPECT_EQ(hub.count("GET /" + hub.file("model.safetensors").etag), 1);
}

}  // namespace
}  // namespace krait::hub
