// A hub with one repository, "org/name", and the storage that it redirects large files to, each on a
// port of its own. It behaves as huggingface.co does; a test adds the misbehaviour.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "io/hub/loopback_server.h"
#include "krait/io/hub.h"

namespace krait::hub {

class FakeHub {
 public:
  struct File {
    std::string content;
    std::string etag;
    bool large = false;  // in the storage, named by its SHA-256
  };

  FakeHub();

  void put(const std::string& name, std::string content, bool large = false);
  // A small model: config.json, tokenizer.json, README.md and a model.safetensors in the storage.
  void put_model(std::size_t weight_bytes = 300'000);
  [[nodiscard]] const File& file(const std::string& name) const { return files_.at(name); }

  // Looks at each request first; returns whether it has answered it. `keep` says whether the connection
  // lives on, false to begin with.
  using Trouble = std::function<bool(const Request&, Connection&, bool& keep)>;
  Trouble trouble;          // of the hub
  Trouble storage_trouble;  // of the storage
  bool error_codes = true;  // the X-Error-Code of huggingface.co, which mirrors lack
  std::string commit = "0123456789abcdef0123456789abcdef01234567";

  [[nodiscard]] std::string endpoint() const { return hub_.origin(); }
  // Options for this hub that do not wait long.
  [[nodiscard]] Options options(const std::filesystem::path& cache) const;

  // Requests whose "METHOD target" contains `text`, to the hub or to the storage.
  [[nodiscard]] int count(std::string_view text) const;
  [[nodiscard]] std::vector<Request> requests(std::string_view text) const;

  // Sends `content`, or the part of it that a Range header asks for.
  static bool send_content(const Request& request, Connection& connection, std::string_view content,
                           std::string_view headers = {});

 private:
  bool serve_hub(const Request& request, Connection& connection);
  bool serve_storage(const Request& request, Connection& connection);
  bool not_found(const Request& request, Connection& connection, std::string_view code) const;
  void note(const Request& request);

  std::map<std::string, File> files_;
  mutable std::mutex mutex_;
  std::vector<Request> requests_;
  // Last, so that they stop first.
  LoopbackServer storage_;
  LoopbackServer hub_;
};

// Bytes without a pattern that a mistake could repeat.
[[nodiscard]] std::string noise(std::size_t size, unsigned seed = 1);

}  // namespace krait::hub
