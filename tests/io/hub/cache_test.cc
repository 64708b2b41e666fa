// The cache without the hub: one that Python made, offline, read-only, damaged, locked.
#include "io/hub/cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <thread>

#include "io/hub/hub_fixture.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;

constexpr const char* kCommit = "0123456789abcdef0123456789abcdef01234567";

class HubCache : public HubTest {
 protected:
  // As Python's huggingface_hub leaves it.
  void make_by_hand(const std::vector<std::string>& files) {
    fs::create_directories(repo_ / "blobs");
    fs::create_directories(repo_ / "refs");
    fs::create_directories(repo_ / "snapshots" / kCommit);
    std::ofstream(repo_ / "refs" / "main") << kCommit;
    for (const std::string& file : files) {
      std::ofstream(repo_ / "blobs" / ("blob-of-" + file)) << "content of " << file;
      fs::create_symlink("../../blobs/blob-of-" + file, repo_ / "snapshots" / kCommit / file);
    }
  }
};

TEST_F(HubCache, OfPythonIsUsedOffline) {
  make_by_hand({"config.json", "pytorch_model.bin"});
  options_.offline = true;
  EXPECT_EQ(get(), repo_ / "snapshots" / kCommit);
  EXPECT_EQ(get(kCommit), repo_ / "snapshots" / kCommit);
  EXPECT_EQ(hub_.count(""), 0);
  EXPECT_FALSE(fs::exists(cache_ / ".locks")) << "looking writes nothing";
}

TEST_F(HubCache, OfPythonIsCompletedOnline) {
  hub_.put_model();
  make_by_hand({"config.json", "pytorch_model.bin"});
  EXPECT_EQ(get(), snapshot());
  expect_file("tokenizer.json");
  EXPECT_EQ(io::content_of(snapshot() / "config.json"), "content of config.json");
  EXPECT_EQ(weight_requests().size(), 0U) << "weights of this commit are there, in another format";
}

TEST_F(HubCache, OfflineWithoutTheModelIsAnError) {
  hub_.put_model();
  options_.offline = true;
  EXPECT_MESSAGE(get(),
                 "org/name@main: is not in " + cache_.string() + ", and HF_HUB_OFFLINE forbids to fetch it");
  EXPECT_EQ(kind_of_failure(), ErrorKind::not_found);
  make_by_hand({"config.json"});
  EXPECT_EQ(kind_of_failure(), ErrorKind::not_found) << "no weights";
  EXPECT_EQ(hub_.count(""), 0);
}

TEST_F(HubCache, IsUsedWhenTheHubIsAway) {
  hub_.put_model();
  make_by_hand({"config.json", "model.safetensors"});
  hub_.trouble = [](const Request& request, Connection& connection, bool&) {
    return connection.answer(request, "503 Service Unavailable");
  };
  EXPECT_EQ(get(), snapshot());
  ASSERT_EQ(warnings_.size(), 1U);
  EXPECT_NE(warnings_[0].find("(HTTP 503); using org/name from the cache, commit " + hub_.commit),
            std::string::npos)
      << warnings_[0];
  EXPECT_EQ(hub_.count(""), 1) << "who has the model does not wait";

  const std::string closed = LoopbackServer({}).origin();  // nobody listens there any more
  options_.endpoint = closed;
  EXPECT_EQ(get(), snapshot());
  ASSERT_EQ(warnings_.size(), 2U);
  EXPECT_NE(warnings_[1].find(closed), std::string::npos) << warnings_[1];

  hub_.trouble = [](const Request& request, Connection& connection, bool&) {
    return connection.answer(request, "200 OK", {}, "<html>Log in to this network</html>");
  };
  options_.endpoint = hub_.endpoint();
  EXPECT_EQ(get(), snapshot());
  EXPECT_EQ(warnings_.size(), 3U);
  hub_.trouble = [](const Request& request, Connection& connection, bool&) {
    return connection.answer(request, "401 Unauthorized");
  };
  EXPECT_EQ(get(), snapshot()) << "a repository that has become private";
  EXPECT_EQ(warnings_.size(), 4U);
  EXPECT_EQ(kind_of_failure("other"), ErrorKind::network) << "a branch that the cache does not have";
}

TEST_F(HubCache, WithADamagedRefIsNotTrusted) {
  make_by_hand({"config.json", "model.safetensors"});
  for (const char* text : {"", "../../../etc", "main", "0123456789ABCDEF0123456789abcdef01234567"}) {
    std::ofstream(repo_ / "refs" / "main") << text;
    EXPECT_EQ(find_cached({"org/name", "main"}, options_), std::nullopt) << text;
  }
  std::ofstream(repo_ / "refs" / "main") << kCommit << "\n";
  EXPECT_TRUE(find_cached({"org/name", "main"}, options_));
}

TEST_F(HubCache, WithALinkToNothingIsRepaired) {
  hub_.put_model();
  get();
  fs::remove(blob("model.safetensors"));
  EXPECT_EQ(find_cached({"org/name", "main"}, options_), std::nullopt);
  get();
  expect_file("model.safetensors");
}

TEST_F(HubCache, WithABlobOfAnotherLengthIsRepaired) {
  hub_.put_model();
  fs::create_directories(repo_ / "blobs");
  std::ofstream(blob("model.safetensors")) << "cut off";
  get();
  expect_file("model.safetensors");
}

// Root may write anywhere; nobody may not.
class AsNobody {
 public:
  AsNobody() {
    if (::geteuid() == 0 && ::seteuid(65534) != 0) ADD_FAILURE() << "cannot become nobody";
  }
  ~AsNobody() {
    if (::getuid() == 0 && ::seteuid(0) != 0) std::abort();
  }
  AsNobody(const AsNobody&) = delete;
  AsNobody& operator=(const AsNobody&) = delete;
};

void forbid_writing(const fs::path& directory) {
  constexpr fs::perms kWrite = fs::perms::owner_write | fs::perms::group_write | fs::perms::others_write;
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    if (entry.is_directory() && !entry.is_symlink()) fs::permissions(entry, kWrite, fs::perm_options::remove);
  fs::permissions(directory, kWrite, fs::perm_options::remove);
}

void allow_writing(const fs::path& directory) {
  fs::permissions(directory, fs::perms::owner_write, fs::perm_options::add);
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    if (entry.is_directory() && !entry.is_symlink())
      fs::permissions(entry, fs::perms::owner_write, fs::perm_options::add);
}

TEST_F(HubCache, MayBeReadOnly) {
  hub_.put_model();
  fs::permissions(scratch_.path(), fs::perms{0755});
  make_by_hand({"config.json", "model.safetensors", "tokenizer.json"});
  forbid_writing(cache_);
  {
    const AsNobody nobody;
    EXPECT_EQ(get(), snapshot()) << "complete: nothing has to be written";
    EXPECT_EQ(get("refs/pr/1"), snapshot()) << "the name of a branch is not worth an error";
    hub_.commit = "89abcdef0123456789abcdef0123456789abcdef";
    EXPECT_EQ(kind_of_failure(), ErrorKind::io);
    EXPECT_MESSAGE(
        get(), "snapshots/89abcdef0123456789abcdef0123456789abcdef: cannot be created: Permission denied");
  }
  allow_writing(cache_);
}

TEST_F(HubCache, WaitsForTheLockOfAnotherProcess) {
  hub_.put_model();
  const fs::path locks = cache_ / ".locks" / "models--org--name";
  fs::create_directories(locks);
  const fs::path path = locks / (hub_.file("model.safetensors").etag + ".lock");
  const int other = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  ASSERT_EQ(::flock(other, LOCK_EX), 0);
  std::string told;
  options_.log = [&](LogLevel, std::string_view message) { told = message; };
  std::atomic<bool> stop = false;
  options_.cancelled = [&] { return stop || !told.empty(); };
  EXPECT_EQ(kind_of_failure(), ErrorKind::interrupted) << "waiting can be interrupted";
  EXPECT_EQ(told, "model.safetensors: another process is downloading it, waiting");
  EXPECT_EQ(weight_requests().size(), 0U);

  // The other one completes the file, removes the lock as newer versions of Python's filelock do, and lets
  // go.
  options_.cancelled = {};
  std::thread helper([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    std::ofstream(blob("model.safetensors"), std::ios::binary) << hub_.file("model.safetensors").content;
    fs::remove(path);
    ::close(other);
  });
  get();
  helper.join();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().size(), 0U);
  EXPECT_TRUE(fs::exists(path)) << "locked anew by its name";
}

TEST_F(HubCache, MustBeGiven) {
  options_.cache.clear();
  EXPECT_MESSAGE(get(), "set HF_HOME or HF_HUB_CACHE");
  EXPECT_EQ(kind_of_failure(), ErrorKind::invalid_argument);
}

TEST_F(HubCache, WhereAFileIsInTheWay) {
  hub_.put_model();
  std::ofstream(cache_.string()) << "a file";
  EXPECT_EQ(kind_of_failure(), ErrorKind::io);
  EXPECT_EQ(io::content_of(cache_), "a file");
}

}  // namespace
}  // namespace krait::hub
