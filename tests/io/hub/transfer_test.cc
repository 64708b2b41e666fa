// Bytes on their way: connections that break, stall and lie, disks that are full, users who stop.
#include <signal.h>
#include <sys/resource.h>

#include <atomic>

#include "io/hub/hub_fixture.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;

class HubTransfer : public HubTest {
 protected:
  HubTransfer() { hub_.put_model(kSize); }

  // The storage sends `bytes` of what was asked for, then hangs up; `times` times.
  void break_off_after(std::size_t bytes, int times) {
    left_ = times;
    hub_.storage_trouble = [this, bytes](const Request& request, Connection& connection, bool&) {
      if (left_-- <= 0) return false;
      const std::string& all = hub_.file("model.safetensors").content;
      const std::string range = request.header("range");
      const std::size_t first = range.empty() ? 0 : std::stoull(range.substr(range.find('=') + 1));
      std::string head = range.empty() ? "HTTP/1.1 200 OK\r\n" : "HTTP/1.1 206 Partial Content\r\n";
      if (!range.empty())
        head += "Content-Range: bytes " + std::to_string(first) + "-" + std::to_string(all.size() - 1) + "/" +
                std::to_string(all.size()) + "\r\n";
      head += "Content-Length: " + std::to_string(all.size() - first) + "\r\n\r\n";
      connection.send(head + all.substr(first, bytes));
      return true;
    };
  }
  // Answers of the storage in place of the weights.
  void answer_with(const std::string& status, const std::string& headers, const std::string& body) {
    hub_.storage_trouble = [=](const Request& request, Connection& connection, bool&) {
      return connection.answer(request, status, headers, body);
    };
  }
  void leave_partial(std::string_view content) const {
    fs::create_directories(repo_ / "blobs");
    std::ofstream(partial("model.safetensors"), std::ios::binary) << content;
  }
  void expect_nothing_in_place() const {
    EXPECT_FALSE(fs::exists(blob("model.safetensors")));
    EXPECT_FALSE(fs::exists(fs::symlink_status(snapshot() / "model.safetensors")));
    EXPECT_FALSE(fs::exists(repo_ / "refs" / "main"));
  }

  static constexpr std::size_t kSize = 300'000;
  std::atomic<int> left_ = 0;
};

TEST_F(HubTransfer, ResumesAfterABreak) {
  break_off_after(100'000, 2);
  get();
  expect_file("model.safetensors");
  const auto requests = weight_requests();
  ASSERT_EQ(requests.size(), 3U);
  EXPECT_EQ(requests[0].header("range"), "");
  EXPECT_EQ(requests[1].header("range"), "bytes=100000-");
  EXPECT_EQ(requests[2].header("range"), "bytes=200000-");
  EXPECT_EQ(hub_.count("GET /org/name/resolve/" + hub_.commit + "/model.safetensors"), 3)
      << "each try asks the hub anew: signed addresses expire";
  EXPECT_FALSE(fs::exists(partial("model.safetensors")));
}

TEST_F(HubTransfer, ResumesInTheNextRun) {
  break_off_after(70'000, 1);
  options_.retries = 0;
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
  expect_nothing_in_place();
  EXPECT_TRUE(io::content_of(partial("model.safetensors")) ==
              hub_.file("model.safetensors").content.substr(0, 70'000));
  std::uint64_t first = 0;
  options_.progress = [&](const Progress& progress) {
    if (progress.file == "model.safetensors" && first == 0) first = progress.bytes_done;
  };
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(first, 70'000U);
  EXPECT_EQ(weight_requests().back().header("range"), "bytes=70000-");
}

TEST_F(HubTransfer, GivesUpAfterTriesThatBringNothing) {
  break_off_after(0, 1000);
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
  EXPECT_EQ(weight_requests().size(), 4U);
  expect_nothing_in_place();
}

TEST_F(HubTransfer, TriesThatBringMuchDoNotCount) {
  hub_.put_model(12 << 20);
  break_off_after(1 << 20, 9);
  options_.retries = 1;
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().size(), 10U);
}

TEST_F(HubTransfer, AServerThatAlwaysStartsAnewDoesNotKeepUsForever) {
  hub_.put_model(4 << 20);
  hub_.storage_trouble = [&](const Request&, Connection& connection, bool&) {
    connection.send("HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(4 << 20) + "\r\n\r\n" +
                    hub_.file("model.safetensors").content.substr(0, 2 << 20));
    return true;
  };
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
  EXPECT_EQ(weight_requests().size(), 4U) << "the first brought something, the three others nothing new";
}

TEST_F(HubTransfer, ResumesWhereTheServerStalls) {
  // A slow drip: fewer bytes a second than any line brings.
  std::atomic<bool> dripped = false;
  hub_.storage_trouble = [&](const Request&, Connection& connection, bool&) {
    if (dripped.exchange(true)) return false;
    connection.send("HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n");
    for (int i = 0; i < 200 && connection.send(
                                   {&hub_.file("model.safetensors").content[static_cast<std::size_t>(i)], 1});
         ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    return true;
  };
  const auto began = std::chrono::steady_clock::now();
  get();
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(8));
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().size(), 2U);
  EXPECT_NE(weight_requests().back().header("range"), "") << "the few bytes were kept";
}

TEST_F(HubTransfer, ASilentServerIsAnError) {
  hub_.trouble = [](const Request&, Connection& connection, bool&) {
    connection.wait_for_hangup();
    return true;
  };
  options_.retries = 0;
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
}

TEST_F(HubTransfer, ALieAboutTheChecksum) {
  std::string other = hub_.file("model.safetensors").content;
  other[12345] ^= 1;
  answer_with("200 OK", "", other);
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
  EXPECT_EQ(weight_requests().size(), 1U);
  EXPECT_MESSAGE(
      get(), "model.safetensors: what arrived has not the checksum " + hub_.file("model.safetensors").etag);
  expect_nothing_in_place();
  EXPECT_FALSE(fs::exists(partial("model.safetensors")));
}

TEST_F(HubTransfer, ALieAboutTheChecksumOfASmallFile) {
  hub_.trouble = [&](const Request& request, Connection& connection, bool& keep) {
    keep = true;
    const bool body = request.method == "GET" && request.target.find("resolve-cache") != std::string::npos &&
                      request.target.ends_with("config.json");
    return body && connection.answer(request, "200 OK", "", R"({"d_model": 5})");
  };
  EXPECT_MESSAGE(get(), "config.json: what arrived has not the checksum " + hub_.file("config.json").etag);
  EXPECT_FALSE(fs::exists(snapshot() / "config.json"));
}

TEST_F(HubTransfer, AnEtagThatIsNoChecksumIsSaid) {
  hub_.trouble = [&](const Request& request, Connection& connection, bool& keep) {
    keep = true;
    if (!request.target.ends_with("config.json")) return false;
    return connection.answer(request, "200 OK", "ETag: \"d41d8cd98f00b204-2\"\r\n",
                             hub_.file("config.json").content);
  };
  get();
  expect_file("config.json");
  ASSERT_EQ(warnings_.size(), 1U);
  EXPECT_NE(warnings_[0].find("config.json: the hub gives no checksum"), std::string::npos) << warnings_[0];
}

TEST_F(HubTransfer, ADamagedBeginningIsFetchedAnew) {
  leave_partial(std::string(100'000, 'x'));
  get();
  expect_file("model.safetensors");
  const auto requests = weight_requests();
  ASSERT_EQ(requests.size(), 2U);
  EXPECT_EQ(requests[0].header("range"), "bytes=100000-");
  EXPECT_EQ(requests[1].header("range"), "");
  ASSERT_EQ(warnings_.size(), 1U);
}

TEST_F(HubTransfer, ABeginningThatIsLongerThanTheFile) {
  leave_partial(std::string(kSize + 1, 'x'));
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().size(), 1U);
}

TEST_F(HubTransfer, ABeginningThatIsTheWholeFile) {
  leave_partial(hub_.file("model.safetensors").content);
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().size(), 0U);
}

TEST_F(HubTransfer, AServerThatIgnoresRanges) {
  leave_partial(hub_.file("model.safetensors").content.substr(0, 100'000));
  answer_with("200 OK", "", hub_.file("model.safetensors").content);
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().size(), 1U);
}

TEST_F(HubTransfer, AServerThatKnowsNoSuchRange) {
  leave_partial(hub_.file("model.safetensors").content.substr(0, 100'000));
  hub_.storage_trouble = [](const Request& request, Connection& connection, bool&) {
    return !request.header("range").empty() && connection.answer(request, "416 Range Not Satisfiable");
  };
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().size(), 2U);
}

TEST_F(HubTransfer, AServerThatSendsAnotherRange) {
  const std::string& all = hub_.file("model.safetensors").content;
  for (const char* range : {"bytes 0-199999/300000", "bytes 100000-299999/300001",
                            "bytes 100000-299998/300000", "nonsense", ""}) {
    SCOPED_TRACE(range);
    fs::remove_all(cache_);
    leave_partial(all.substr(0, 100'000));
    hub_.storage_trouble = [&](const Request& request, Connection& connection, bool&) {
      const std::string header = *range == '\0' ? "" : std::string("Content-Range: ") + range + "\r\n";
      return !request.header("range").empty() &&
             connection.answer(request, "206 Partial Content", header, all.substr(0, 200'000));
    };
    get();
    expect_file("model.safetensors");
    EXPECT_EQ(warnings_, std::vector<std::string>{}) << "seen at once, not by the checksum";
  }
}

TEST_F(HubTransfer, LiesAboutTheLength) {
  answer_with("200 OK", "", hub_.file("model.safetensors").content + "x");
  EXPECT_MESSAGE(get(), "model.safetensors: the server sends 300001 bytes, the hub announced 300000");
  expect_nothing_in_place();
  // Without a Content-Length the surplus shows only when it comes.
  hub_.storage_trouble = [&](const Request&, Connection& connection, bool&) {
    connection.send("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + hub_.file("model.safetensors").content +
                    "x");
    return true;
  };
  EXPECT_MESSAGE(get(), "the server sends more than the 300000 bytes that the hub announced");
  expect_nothing_in_place();
  // Too few, likewise; the rest is asked for.
  std::atomic<bool> first = true;
  hub_.storage_trouble = [&](const Request&, Connection& connection, bool&) {
    if (!first.exchange(false)) return false;
    connection.send("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" +
                    hub_.file("model.safetensors").content.substr(0, 1000));
    return true;
  };
  fs::remove_all(cache_);
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().back().header("range"), "bytes=1000-");
}

TEST_F(HubTransfer, StopsWhenAskedTo) {
  std::atomic<bool> stop = false;
  options_.cancelled = [&] { return stop.load(); };
  options_.progress = [&](const Progress& progress) {
    if (progress.file == "model.safetensors" && progress.bytes_done > 0) stop = true;
  };
  hub_.storage_trouble = [&](const Request&, Connection& connection, bool&) {
    if (stop) return false;
    connection.send("HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" +
                    hub_.file("model.safetensors").content.substr(0, 50'000));
    connection.wait_for_hangup();
    return true;
  };
  EXPECT_EQ(kind_of_failure(), ErrorKind::interrupted);
  expect_nothing_in_place();
  EXPECT_GT(fs::file_size(partial("model.safetensors")), 0U);
  options_.progress = {};
  options_.cancelled = {};
  get();
  expect_file("model.safetensors");
  EXPECT_NE(weight_requests().back().header("range"), "");
}

TEST_F(HubTransfer, StopsWhileWaiting) {
  hub_.trouble = [](const Request& request, Connection& connection, bool&) {
    return connection.answer(request, "503 Service Unavailable");
  };
  options_.retry_delay = std::chrono::hours(1);
  options_.cancelled = [&] { return hub_.count("") > 0; };
  EXPECT_EQ(kind_of_failure(), ErrorKind::interrupted);
}

TEST_F(HubTransfer, ExceptionsOfTheCallerPass) {
  options_.progress = [](const Progress& progress) {
    if (progress.bytes_done > 0) throw std::runtime_error("of the caller");
  };
  EXPECT_THROW(get(), std::runtime_error);
  options_.progress = {};
  get();
  expect_file("model.safetensors");
}

// Lets no file grow beyond `bytes` as long as it lives, as a full disk would.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    signal_ = ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{.rlim_cur = bytes, .rlim_max = before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, signal_);
  }
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

 private:
  rlimit before_{};
  sighandler_t signal_ = SIG_DFL;
};

TEST_F(HubTransfer, ADiskThatFillsUp) {
  {
    const FileSizeLimit full(100'000);
    EXPECT_EQ(kind_of_failure(), ErrorKind::io);
    EXPECT_MESSAGE(get(), ".incomplete: cannot be written: File too large");
    expect_nothing_in_place();
    EXPECT_EQ(fs::file_size(partial("model.safetensors")), 100'000U);
  }
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(weight_requests().back().header("range"), "bytes=100000-");
}

TEST_F(HubTransfer, ADiskThatIsTooSmall) {
  hub_.trouble = [&](const Request& request, Connection& connection, bool&) {
    if (!request.target.ends_with("model.safetensors")) return false;
    return connection.answer(request, "302 Found",
                             "X-Linked-Size: 5000000000000000000\r\nX-Linked-Etag: \"" +
                                 std::string(64, 'a') + "\"\r\nLocation: http://127.0.0.2:1/x\r\n");
  };
  EXPECT_EQ(kind_of_failure(), ErrorKind::io);
  EXPECT_MESSAGE(get(), "the disk is too full for org/name@main: it needs 5000000000001 MB, free are ");
  EXPECT_EQ(hub_.count("GET /org/name"), 0) << "said before anything is fetched";
}

}  // namespace
}  // namespace krait::hub
