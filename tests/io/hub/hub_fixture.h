// A fake hub, an empty cache, and what the log said.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "io/hub/fake_hub.h"
#include "io/scratch.h"
#include "krait/core/error.h"
#include "krait/io/hub.h"

namespace krait::hub {

class HubTest : public testing::Test {
 protected:
  HubTest() {
    options_ = hub_.options(cache_);
    options_.log = [this](LogLevel level, std::string_view message) {
      if (level == LogLevel::warning) warnings_.emplace_back(message);
    };
  }

  std::filesystem::path get(const std::string& revision = "main") {
    return download({"org/name", revision}, options_);
  }

  // The kind and the message of the Error that a download ends with.
  ErrorKind kind_of_failure(const std::string& revision = "main") {
    try {
      get(revision);
    } catch (const Error& error) {
      return error.kind();
    }
    ADD_FAILURE() << "no error";
    return ErrorKind::invalid_argument;
  }

  [[nodiscard]] std::filesystem::path blob(const std::string& file) const {
    return repo_ / "blobs" / hub_.file(file).etag;
  }
  [[nodiscard]] std::filesystem::path partial(const std::string& file) const {
    return blob(file).string() + ".incomplete";
  }
  [[nodiscard]] std::filesystem::path snapshot() const { return repo_ / "snapshots" / hub_.commit; }
  void expect_file(const std::string& file) const {
    EXPECT_TRUE(io::content_of(snapshot() / file) == hub_.file(file).content)
        << file << " has another content";
  }
  // The GETs for the weights that reached the storage.
  [[nodiscard]] std::vector<Request> weight_requests() const {
    return hub_.requests("GET /" + hub_.file("model.safetensors").etag);
  }

  io::Scratch scratch_;
  std::filesystem::path cache_ = scratch_ / "cache";
  std::filesystem::path repo_ = cache_ / "models--org--name";
  FakeHub hub_;
  Options options_;
  std::vector<std::string> warnings_;
};

}  // namespace krait::hub
