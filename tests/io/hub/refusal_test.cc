// What the hub may say instead of a file, and what a hostile one may try.
#include "io/hub/hub_fixture.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;
using HubRefusal = HubTest;

FakeHub::Trouble always(const std::string& status, const std::string& headers = {},
                        const std::string& body = {}) {
  return [=](const Request& request, Connection& connection, bool&) {
    return connection.answer(request, status, headers, body);
  };
}

TEST_F(HubRefusal, GatedAndPrivate) {
  hub_.put_model();
  hub_.trouble = always("401 Unauthorized");
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
  EXPECT_MESSAGE(get(),
                 "(HTTP 401): the repository is gated or private, and needs HF_TOKEN, or does not exist");
  options_.token = "hf_old";
  EXPECT_MESSAGE(get(), "the hub refuses the token (HTTP 401): HF_TOKEN is not valid");
  hub_.trouble = always("403 Forbidden");
  EXPECT_MESSAGE(get(),
                 "access denied (HTTP 403): the repository is gated or private; accept its conditions at " +
                     hub_.endpoint() + "/org/name and set HF_TOKEN");
  EXPECT_FALSE(fs::exists(repo_)) << "nothing was written";

  // Gated repositories list their files to everybody.
  hub_.trouble = [](const Request& request, Connection& connection, bool&) {
    return request.target.find("/resolve/") != std::string::npos &&
           connection.answer(request, "403 Forbidden");
  };
  EXPECT_MESSAGE(get(), "org/name@main: config.json: access denied (HTTP 403)");
}

TEST_F(HubRefusal, MissingRepositoryRevisionOrFile) {
  hub_.put_model();
  for (const bool codes : {true, false}) {
    SCOPED_TRACE(codes ? "with X-Error-Code" : "a mirror");
    hub_.error_codes = codes;
    EXPECT_MESSAGE(download({"org/else", "main"}, options_),
                   "org/else: no such repository at " + hub_.endpoint());
    EXPECT_MESSAGE(get("v2"), "org/name: has no revision \"v2\"");
    EXPECT_EQ(kind_of_failure("v2"), ErrorKind::not_found);
  }
  hub_.trouble = [](const Request& request, Connection& connection, bool&) {
    return request.target.find("/config.json") != std::string::npos &&
           connection.answer(request, "404 Not Found");
  };
  EXPECT_MESSAGE(get(), "org/name@main: has no file \"config.json\"");
  EXPECT_EQ(kind_of_failure(), ErrorKind::not_found);
  hub_.trouble = always("418 I'm a teapot");
  EXPECT_MESSAGE(get(), "answers with an unexpected status (HTTP 418)");
}

TEST_F(HubRefusal, NotAModel) {
  hub_.put("README.md", "hello");
  EXPECT_MESSAGE(get(), "org/name@main: has no config.json");
  hub_.put("config.json", "{}");
  hub_.put("model.gguf", "x");
  EXPECT_MESSAGE(get(), "has no weights in a format that Krait reads");
  EXPECT_EQ(kind_of_failure(), ErrorKind::invalid_argument);
  hub_.put("model.safetensors.index.json", R"({"weight_map": {"a": "model-1.safetensors"}})");
  EXPECT_MESSAGE(get(),
                 "model.safetensors.index.json: names the shard \"model-1.safetensors\", which the "
                 "repository does not have");
  hub_.put("model.safetensors.index.json", R"({"weight_map": {"a": "../../../../escaped"}})");
  const io::Scratch scratch;
  options_.cache = scratch.path();
  EXPECT_MESSAGE(get(), "names the shard \"../../../../escaped\"");
}

TEST_F(HubRefusal, TooManyRequests) {
  hub_.put_model();
  int left = 2;
  std::string retry_after = "Retry-After: 0\r\n";
  hub_.trouble = [&](const Request& request, Connection& connection, bool& keep) {
    keep = true;
    return left-- > 0 && connection.answer(request, "429 Too Many Requests", retry_after);
  };
  get();
  expect_file("model.safetensors");
  EXPECT_EQ(warnings_, std::vector<std::string>{});

  const io::Scratch scratch;
  options_.cache = scratch.path();
  left = 1;
  retry_after = "Retry-After: 1\r\n";
  options_.retry_delay = std::chrono::hours(1);  // what the hub asks for goes first
  const auto began = std::chrono::steady_clock::now();
  get();
  EXPECT_GE(std::chrono::steady_clock::now() - began, std::chrono::seconds(1)) << "the hub asked to wait";
}

TEST_F(HubRefusal, TooManyRequestsForTooLong) {
  hub_.put_model();
  hub_.trouble = always("429 Too Many Requests", "Retry-After: 0\r\n");
  EXPECT_MESSAGE(get(), "limits how often it may be asked (HTTP 429) (tried 4 times)");
  EXPECT_EQ(hub_.count(""), 4);
  hub_.trouble = always("429 Too Many Requests", "Retry-After: 3600\r\n");
  EXPECT_MESSAGE(get(), "(HTTP 429); it asks to wait 3600 seconds: try again later");
  EXPECT_EQ(hub_.count(""), 5) << "not asked again";
  hub_.trouble = always("429 Too Many Requests");
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
}

TEST_F(HubRefusal, ServerErrorsPass) {
  hub_.put_model();
  options_.retries = 4;  // two by the hub and two by the storage for the same file
  std::map<std::string, int> asked;
  hub_.trouble = hub_.storage_trouble = [&](const Request& request, Connection& connection, bool& keep) {
    keep = true;
    return ++asked[request.method + request.target] <= 2 &&
           connection.answer(request, "503 Service Unavailable");
  };
  get();
  expect_file("model.safetensors");
  expect_file("config.json");
}

TEST_F(HubRefusal, ServerErrorsThatStay) {
  hub_.put_model();
  hub_.trouble = always("500 Internal Server Error", "", std::string(1'000'000, 'x'));
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
  EXPECT_MESSAGE(get(), hub_.endpoint() + " answers with an error (HTTP 500) (tried 4 times)");
  options_.retries = 0;
  EXPECT_MESSAGE(get(), "answers with an error (HTTP 500)");
}

TEST_F(HubRefusal, RedirectsWithoutEnd) {
  hub_.put_model();
  hub_.trouble = [](const Request& request, Connection& connection, bool& keep) {
    keep = true;
    return connection.answer(request, "302 Found", "Location: " + request.target + "x\r\n");
  };
  EXPECT_MESSAGE(get(), "redirects more than 10 times");
  EXPECT_EQ(kind_of_failure(), ErrorKind::network);
}

TEST_F(HubRefusal, RedirectsToOtherProtocols) {
  hub_.put_model();
  const fs::path secret =
      scratch_.put("secret", R"({"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": []})");
  for (const std::string& target :
       {"file://" + secret.string(), std::string("ftp://127.0.0.1/x"), std::string("gopher://127.0.0.1/x"),
        std::string("javascript:alert(1)")}) {
    hub_.trouble = always("302 Found", "Location: " + target + "\r\n");
    EXPECT_MESSAGE(get(),
                   "redirects to \"" + target.substr(0, target.find(':')) + "\", expected http or https");
  }
  options_.endpoint = "file://" + scratch_.path().string();
  EXPECT_MESSAGE(get(), "HF_ENDPOINT is");
}

TEST_F(HubRefusal, AnswersThatAreNone) {
  hub_.put_model();
  for (const char* body :
       {"", "<html>", "[]", "{}", R"({"sha": 1, "siblings": []})", R"({"sha": "x", "siblings": []})",
        R"({"sha": "../../../../../../../../../../../../etcx", "siblings": []})",
        R"({"sha": "0123456789abcdef0123456789abcdef01234567"})",
        R"({"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": [{"name": "x"}]})",
        R"({"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": 3})"}) {
    SCOPED_TRACE(body);
    hub_.trouble = always("200 OK", "", body);
    EXPECT_EQ(kind_of_failure(), ErrorKind::network);
    EXPECT_MESSAGE(get(), "the answer on org/name@main");
  }
  hub_.trouble = {};
  EXPECT_EQ(kind_of_failure("1111111111111111111111111111111111111111"), ErrorKind::not_found);
  hub_.trouble =
      always("200 OK", "", R"({"sha": "0123456789abcdef0123456789abcdef01234567", "siblings": []})");
  EXPECT_MESSAGE(get("1111111111111111111111111111111111111111"),
                 "expected 1111111111111111111111111111111111111111");
}

TEST_F(HubRefusal, HeadersThatLie) {
  hub_.put_model();
  const auto with_headers = [&](const std::string& headers) {
    hub_.trouble = [=](const Request& request, Connection& connection, bool&) {
      return request.method == "HEAD" && connection.answer(request, "200 OK", headers, "12345");
    };
  };
  for (const char* etag : {"", "ETag: \"\"\r\n", "ETag: \"../../../../escaped\"\r\n", "ETag: \"a/b\"\r\n",
                           "ETag: \"..\"\r\n", "X-Linked-Etag: \"/etc/x\"\r\nETag: \"0123\"\r\n"}) {
    SCOPED_TRACE(etag);
    with_headers(etag);
    EXPECT_MESSAGE(get(), "config.json: the hub gives the ETag");
  }
  with_headers("ETag: \"0123\"\r\nX-Repo-Commit: 1111111111111111111111111111111111111111\r\n");
  EXPECT_MESSAGE(get(), "the hub gives it from commit \"1111111111111111111111111111111111111111\"");
  hub_.trouble = [](const Request& request, Connection& connection, bool&) {
    return request.method == "HEAD" &&
           connection.send("HTTP/1.1 200 OK\r\nETag: \"0123\"\r\nConnection: close\r\n\r\n");
  };
  EXPECT_MESSAGE(get(), "the hub does not tell its size");
}

TEST_F(HubRefusal, NamesThatAreNone) {
  EXPECT_MESSAGE(download({"../x", "main"}, options_), "\"../x\" is no name of a repository");
  EXPECT_MESSAGE(download({"org/name", "../x"}, options_), "\"../x\" is no branch, tag or commit");
  EXPECT_MESSAGE((void)find_cached({"/etc", "main"}, options_), "\"/etc\" is no name of a repository");
  options_.token = "hf_x\r\nEvil: 1";
  EXPECT_MESSAGE(get(), "HF_TOKEN has characters that no token has");
  EXPECT_EQ(hub_.count(""), 0);
}

}  // namespace
}  // namespace krait::hub
