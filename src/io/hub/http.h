// HTTP by libcurl, with the rules of the hub: redirects are followed here and not by libcurl, so that
// the token stays with the endpoint, the protocol stays HTTP, and the hub's headers are seen on the way.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "krait/io/hub.h"

namespace krait::hub {

struct Response {
  int status = 0;
  std::string url;                             // that answered, after redirects
  std::map<std::string, std::string> headers;  // lower-case names

  [[nodiscard]] bool ok() const { return status >= 200 && status < 300; }
  [[nodiscard]] std::string_view header(const std::string& name) const;  // empty if absent
  // A header that is a number; nothing if it is absent or none.
  [[nodiscard]] std::optional<std::uint64_t> number(const std::string& name) const;
};

// "https://host:port" of an address, for messages (the rest may carry secrets) and comparison.
[[nodiscard]] std::string origin_of(const std::string& url);

class Http {
 public:
  // Called with each piece of the body of a successful answer. May throw.
  using Receive = std::function<void(const Response&, std::span<const char>)>;

  // Keeps a reference to `options`.
  explicit Http(const Options& options);
  ~Http();
  Http(const Http&) = delete;
  Http& operator=(const Http&) = delete;

  // All three return whatever the server answers, but throw TransientError where another try may help
  // (broken connections, 408, 429, 5xx), Error(network) where it will not (certificates, redirects
  // without end or to another protocol), and Error(interrupted).

  // Follows redirects up to the first to another origin that comes with the hub's own headers on what
  // lies there.
  Response head(const std::string& url);
  // The body as text, of at most `limit` bytes.
  Response get(const std::string& url, std::size_t limit, std::string& body);
  // The bytes from `offset` on, if the server heeds that (status 206).
  Response get(const std::string& url, std::uint64_t offset, const Receive& receive);

 private:
  enum class Method { head, get };
  struct Transfer;

  Response follow(Method method, std::string url, std::uint64_t offset, const Receive& receive);
  Response perform(Method method, const std::string& url, std::uint64_t offset, const Receive& receive,
                   std::string& redirect);
  static std::size_t on_body(char* data, std::size_t size, std::size_t count, void* transfer);
  static int on_progress(void* transfer, std::int64_t, std::int64_t, std::int64_t, std::int64_t);

  struct Handles;
  const Options& options_;
  std::string endpoint_origin_;
  bool reached_ = false;  // some server has answered
  std::unique_ptr<Handles> handles_;
};

}  // namespace krait::hub
