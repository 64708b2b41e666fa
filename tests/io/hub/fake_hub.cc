#include "io/hub/fake_hub.h"

#include <stdlib.h>

#include <random>

#include "io/hub/checksum.h"

namespace krait::hub {

FakeHub::FakeHub()
    : storage_([this](const Request& request, Connection& connection) {
        return serve_storage(request, connection);
      }),
      hub_(
          [this](const Request& request, Connection& connection) { return serve_hub(request, connection); }) {
  ::setenv("no_proxy", "127.0.0.1", 1);
}

void FakeHub::put(const std::string& name, std::string content, bool large) {
  Checksum sum(std::string(large ? 64 : 40, '0'), content.size());
  sum.update(content);
  files_[name] = {.content = std::move(content), .etag = sum.finish(), .large = large};
}

void FakeHub::put_model(std::size_t weight_bytes) {
  put("config.json", R"({"d_model": 4})");
  put("tokenizer.json", R"({"model": {}})");
  put("README.md", "# A model\n");
  put("model.safetensors", noise(weight_bytes), true);
}

Options FakeHub::options(const std::filesystem::path& cache) const {
  Options options;
  options.endpoint = endpoint();
  options.cache = cache;
  options.connect_timeout = std::chrono::milliseconds(2000);
  options.stall_timeout = std::chrono::seconds(1);
  options.retries = 3;
  options.retry_delay = std::chrono::milliseconds(1);
  return options;
}

std::vector<Request> FakeHub::requests(std::string_view text) const {
  const std::lock_guard guard(mutex_);
  std::vector<Request> found;
  for (const Request& request : requests_)
    if ((request.method + " " + request.target).find(text) != std::string::npos) found.push_back(request);
  return found;
}

int FakeHub::count(std::string_view text) const { return static_cast<int>(requests(text).size()); }

void FakeHub::note(const Request& request) {
  const std::lock_guard guard(mutex_);
  requests_.push_back(request);
}

bool FakeHub::send_content(const Request& request, Connection& connection, std::string_view content,
                           std::string_view headers) {
  const std::string range = request.header("range");
  if (range.empty()) return connection.answer(request, "200 OK", headers, content);
  const std::size_t first = std::stoull(range.substr(range.find('=') + 1));
  if (first >= content.size()) return connection.answer(request, "416 Range Not Satisfiable", headers);
  const std::string total = std::to_string(content.size());
  const std::string part = "Content-Range: bytes " + std::to_string(first) + "-" +
                           std::to_string(content.size() - 1) + "/" + total + "\r\n" + std::string(headers);
  return connection.answer(request, "206 Partial Content", part, content.substr(first));
}

bool FakeHub::not_found(const Request& request, Connection& connection, std::string_view code) const {
  const std::string header = "X-Error-Code: " + std::string(code) + "\r\n";
  return connection.answer(request, "404 Not Found", error_codes ? header : "", "not here");
}

bool FakeHub::serve_hub(const Request& request, Connection& connection) {
  note(request);
  bool keep = false;
  if (trouble && trouble(request, connection, keep)) return keep;
  const std::string api = "/api/models/org/name";
  const std::string resolve = "/org/name/resolve/" + commit + "/";
  const std::string small = "/api/resolve-cache/models/org/name/" + commit + "/";
  const std::string& target = request.target;
  const std::string head = "X-Repo-Commit: " + commit + "\r\n";
  if (target == api || target == api + "/revision/main" || target == api + "/revision/" + commit ||
      target == api + "/revision/refs%2Fpr%2F1") {
    std::string list;
    for (const auto& [name, file] : files_)
      list += std::string(list.empty() ? "" : ", ") + R"({"rfilename": ")" + name + R"("})";
    return connection.answer(request, "200 OK", "Content-Type: application/json\r\n",
                             R"({"id": "org/name", "sha": ")" + commit + R"(", "siblings": [)" + list + "]}");
  }
  if (target.starts_with(api + "/revision/")) return not_found(request, connection, "RevisionNotFound");
  if (target.starts_with("/api/models/")) return not_found(request, connection, "RepoNotFound");
  const bool cached = target.starts_with(small);
  if (!cached && !target.starts_with(resolve)) return not_found(request, connection, "RepoNotFound");
  const auto found = files_.find(target.substr(cached ? small.size() : resolve.size()));
  if (found == files_.end()) return not_found(request, connection, "EntryNotFound");
  const auto& [name, file] = *found;
  if (file.large)
    return connection.answer(request, "302 Found",
                             head + "X-Linked-Size: " + std::to_string(file.content.size()) +
                                 "\r\nX-Linked-Etag: \"" + file.etag +
                                 "\"\r\nLocation: " + storage_.origin() + "/" + file.etag + "\r\n",
                             "elsewhere");
  if (!cached)
    return connection.answer(request, "307 Temporary Redirect", head + "Location: " + small + name + "\r\n",
                             "there");
  return send_content(request, connection, file.content, head + "ETag: W/\"" + file.etag + "\"\r\n");
}

bool FakeHub::serve_storage(const Request& request, Connection& connection) {
  note(request);
  bool keep = false;
  if (storage_trouble && storage_trouble(request, connection, keep)) return keep;
  for (const auto& [name, file] : files_)
    if (file.large && request.target == "/" + file.etag)
      return send_content(request, connection, file.content, "ETag: \"0123\"\r\n");
  return connection.answer(request, "404 Not Found");
}

std::string noise(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random() & 0xff);
  return bytes;
}

}  // namespace krait::hub
