// An HTTP server on 127.0.0.1 that does exactly what a test tells it, mistakes included: whoever
// answers writes the bytes himself.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace krait::hub {

struct Request {
  std::string method;
  std::string target;                          // path and query
  std::map<std::string, std::string> headers;  // lower-case names

  [[nodiscard]] std::string header(const std::string& name) const;  // empty if absent
};

class Connection {
 public:
  explicit Connection(int descriptor) : descriptor_(descriptor) {}
  // False when the other side is gone.
  bool send(std::string_view bytes) const;
  // "HTTP/1.1 <status>", `headers` (each "Name: value\r\n") and a Content-Length, then `body` unless
  // the request was HEAD.
  bool answer(const Request& request, std::string_view status, std::string_view headers = {},
              std::string_view body = {}) const;
  // Until the client hangs up or the server stops.
  void wait_for_hangup() const;

 private:
  int descriptor_;
};

class LoopbackServer {
 public:
  // Returns whether to keep the connection for another request. Called from several threads.
  using Handler = std::function<bool(const Request&, Connection&)>;

  explicit LoopbackServer(Handler handler);
  ~LoopbackServer();
  LoopbackServer(const LoopbackServer&) = delete;
  LoopbackServer& operator=(const LoopbackServer&) = delete;

  // "http://127.0.0.1:port"
  [[nodiscard]] const std::string& origin() const { return origin_; }

 private:
  void accept_all();
  void serve(int descriptor);

  Handler handler_;
  int listener_ = -1;
  std::string origin_;
  std::atomic<bool> stopping_ = false;
  std::mutex mutex_;
  std::set<int> open_;
  std::vector<std::thread> connections_;
  std::thread acceptor_;
};

}  // namespace krait::hub
