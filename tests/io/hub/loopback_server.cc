#include "io/hub/loopback_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

namespace krait::hub {

std::string Request::header(const std::string& name) const {
  const auto found = headers.find(name);
  return found == headers.end() ? std::string() : found->second;
}

bool Connection::send(std::string_view bytes) const {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(descriptor_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(sent));
  }
  return true;
}

bool Connection::answer(const Request& request, std::string_view status, std::string_view headers,
                        std::string_view body) const {
  std::string text = "HTTP/1.1 ";
  text.append(status).append("\r\n").append(headers);
  text += "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n";
  if (request.method != "HEAD") text += body;
  return send(text);
}

void Connection::wait_for_hangup() const {
  char byte = 0;
  while (::recv(descriptor_, &byte, 1, 0) > 0) {
  }
}

LoopbackServer::LoopbackServer(Handler handler) : handler_(std::move(handler)) {
  listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* generic = reinterpret_cast<sockaddr*>(&address);
  if (listener_ < 0 || ::bind(listener_, generic, size) != 0 || ::listen(listener_, 64) != 0 ||
      ::getsockname(listener_, generic, &size) != 0)
    throw std::runtime_error("no loopback socket");
  origin_ = "http://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  acceptor_ = std::thread([this] { accept_all(); });
}

LoopbackServer::~LoopbackServer() {
  stopping_ = true;
  ::shutdown(listener_, SHUT_RDWR);
  acceptor_.join();
  {
    const std::lock_guard guard(mutex_);
    for (const int descriptor : open_) ::shutdown(descriptor, SHUT_RDWR);
  }
  for (std::thread& connection : connections_) connection.join();
  ::close(listener_);
}

void LoopbackServer::accept_all() {
  while (!stopping_) {
    const int descriptor = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    if (descriptor < 0) continue;
    const std::lock_guard guard(mutex_);
    open_.insert(descriptor);
    connections_.emplace_back([this, descriptor] { serve(descriptor); });
  }
}

void LoopbackServer::serve(int descriptor) {
  Connection connection(descriptor);
  std::string received;
  for (bool keep = true; keep;) {
    std::size_t end = 0;
    while ((end = received.find("\r\n\r\n")) == std::string::npos) {
      char piece[4096];
      const ssize_t got = ::recv(descriptor, piece, sizeof piece, 0);
      if (got <= 0) break;
      received.append(piece, static_cast<std::size_t>(got));
    }
    if (end == std::string::npos) break;
    Request request;
    std::string_view head(received.data(), end + 2);
    std::string_view line = head.substr(0, head.find("\r\n"));
    const std::size_t space = line.find(' ');
    request.method = line.substr(0, space);
    request.target = line.substr(space + 1, line.rfind(' ') - space - 1);
    for (head.remove_prefix(line.size() + 2); !head.empty(); head.remove_prefix(line.size() + 2)) {
      line = head.substr(0, head.find("\r\n"));
      std::string name(line.substr(0, line.find(':')));
      std::ranges::transform(name, name.begin(), [](unsigned char c) { return std::tolower(c); });
      request.headers[name] = line.substr(line.find(':') + 2);
    }
    received.erase(0, end + 4);
    keep = handler_(request, connection);
  }
  const std::lock_guard guard(mutex_);
  open_.erase(descriptor);
  ::close(descriptor);
}

}  // namespace krait::hub
