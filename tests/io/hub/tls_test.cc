// Certificates: who is not who he says he is gets neither a question nor the token.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "io/scratch.h"
#include "krait/io/hub.h"

namespace krait::hub {
namespace {

template <typename T, void (*release)(T*)>
struct Release {
  void operator()(T* pointer) const { release(pointer); }
};
using Key = std::unique_ptr<EVP_PKEY, Release<EVP_PKEY, EVP_PKEY_free>>;
using Certificate = std::unique_ptr<X509, Release<X509, X509_free>>;

// Signed by itself, for the next hour.
Certificate certificate_for(const std::string& address, EVP_PKEY* key) {
  Certificate certificate(X509_new());
  X509_set_version(certificate.get(), 2);
  ASN1_INTEGER_set(X509_get_serialNumber(certificate.get()), 1);
  X509_gmtime_adj(X509_getm_notBefore(certificate.get()), -60);
  X509_gmtime_adj(X509_getm_notAfter(certificate.get()), 3600);
  X509_set_pubkey(certificate.get(), key);
  X509_NAME* name = X509_get_subject_name(certificate.get());
  const std::string common = "krait test";
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, reinterpret_cast<const unsigned char*>(common.data()),
                             static_cast<int>(common.size()), -1, 0);
  X509_set_issuer_name(certificate.get(), name);
  X509_EXTENSION* alternative =
      X509V3_EXT_conf_nid(nullptr, nullptr, NID_subject_alt_name, ("IP:" + address).c_str());
  X509_add_ext(certificate.get(), alternative, -1);
  X509_EXTENSION_free(alternative);
  X509_sign(certificate.get(), key, EVP_sha256());
  return certificate;
}

// Answers every request with 404 and remembers what it was asked, one connection after the other.
class TlsServer {
 public:
  explicit TlsServer(const std::string& address_in_certificate)
      : key_(EVP_EC_gen("P-256")), certificate_(certificate_for(address_in_certificate, key_.get())) {
    ::signal(SIGPIPE, SIG_IGN);  // libssl writes to clients that have hung up
    SSL_CTX_use_certificate(context_.get(), certificate_.get());
    SSL_CTX_use_PrivateKey(context_.get(), key_.get());
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    auto* generic = reinterpret_cast<sockaddr*>(&address);
    if (::bind(listener_, generic, size) != 0 || ::listen(listener_, 8) != 0 ||
        ::getsockname(listener_, generic, &size) != 0)
      throw std::runtime_error("no loopback socket");
    origin_ = "https://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
    thread_ = std::thread([this] { serve(); });
  }
  ~TlsServer() { stop(); }
  TlsServer(const TlsServer&) = delete;
  TlsServer& operator=(const TlsServer&) = delete;

  [[nodiscard]] const std::string& origin() const { return origin_; }
  void write_certificate(const std::filesystem::path& path) const {
    const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "w"), &std::fclose);
    PEM_write_X509(file.get(), certificate_.get());
  }
  // What came over connections that were trusted.
  std::string stop() {
    if (thread_.joinable()) {
      ::shutdown(listener_, SHUT_RDWR);
      thread_.join();
      ::close(listener_);
    }
    return received_;
  }

 private:
  void serve() {
    for (;;) {
      const int descriptor = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (descriptor < 0) return;
      const std::unique_ptr<SSL, Release<SSL, SSL_free>> ssl(SSL_new(context_.get()));
      SSL_set_fd(ssl.get(), descriptor);
      char piece[4096];
      if (SSL_accept(ssl.get()) == 1) {
        const int got = SSL_read(ssl.get(), piece, sizeof piece);
        if (got > 0) {
          received_.append(piece, static_cast<std::size_t>(got));
          const std::string answer =
              "HTTP/1.1 404 Not Found\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\nConnection: "
              "close\r\n\r\n";
          SSL_write(ssl.get(), answer.data(), static_cast<int>(answer.size()));
          SSL_shutdown(ssl.get());
        }
      }
      ::close(descriptor);
    }
  }

  Key key_;
  Certificate certificate_;
  std::unique_ptr<SSL_CTX, Release<SSL_CTX, SSL_CTX_free>> context_{SSL_CTX_new(TLS_server_method())};
  int listener_ = -1;
  std::string origin_;
  std::string received_;
  std::thread thread_;
};

class HubTls : public testing::Test {
 protected:
  // The message of the Error that asking `server` ends with.
  std::string ask(const TlsServer& server) {
    ::setenv("no_proxy", "127.0.0.1", 1);
    Options options;
    options.endpoint = server.origin();
    options.cache = scratch_ / "cache";
    options.token = "hf_secret";
    options.ca_bundle = trusted_;
    options.retries = 0;
    return io::message_of([&] { return download({"org/name", "main"}, options); });
  }

  io::Scratch scratch_;
  std::filesystem::path trusted_;
};

TEST_F(HubTls, UnknownCertificatesAreRefused) {
  TlsServer server("127.0.0.1");
  const std::string message = ask(server);
  EXPECT_NE(message.find("certificate"), std::string::npos) << message;
  EXPECT_EQ(server.stop(), "");
}

TEST_F(HubTls, CertificatesOfOthersAreRefused) {
  TlsServer server("127.0.0.2");
  trusted_ = scratch_ / "trusted.pem";
  server.write_certificate(trusted_);
  const std::string message = ask(server);
  EXPECT_NE(message.find("127.0.0.1"), std::string::npos) << message;
  EXPECT_EQ(server.stop(), "");
}

TEST_F(HubTls, TrustedCertificatesAreTaken) {
  TlsServer server("127.0.0.1");
  trusted_ = scratch_ / "trusted.pem";
  server.write_certificate(trusted_);
  EXPECT_EQ(ask(server), "org/name: no such repository at " + server.origin());
  const std::string received = server.stop();
  EXPECT_NE(received.find("GET /api/models/org/name/revision/main"), std::string::npos) << received;
  EXPECT_NE(received.find("Authorization: Bearer hf_secret"), std::string::npos) << received;
}

TEST_F(HubTls, ABundleThatIsNotThereIsAnError) {
  TlsServer server("127.0.0.1");
  trusted_ = scratch_ / "missing.pem";
  const std::string message = ask(server);
  EXPECT_NE(message.find("missing.pem"), std::string::npos) << message;
}

}  // namespace
}  // namespace krait::hub
