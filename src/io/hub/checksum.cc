#include "io/hub/checksum.h"

#include <openssl/evp.h>

#include <array>
#include <new>

#include "io/hub/names.h"
#include "krait/core/error.h"

namespace krait::hub {

struct Checksum::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();

  explicit State(const EVP_MD* kind) {
    if (context == nullptr) throw std::bad_alloc();
    // Fails where a policy of the system (FIPS) forbids SHA-1.
    if (EVP_DigestInit_ex(context, kind, nullptr) != 1) {
      EVP_MD_CTX_free(context);
      fail(ErrorKind::io, "the system's libcrypto does not offer ", EVP_MD_get0_name(kind));
    }
  }
  ~State() { EVP_MD_CTX_free(context); }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
};

Checksum::Checksum(std::string_view expected, std::uint64_t size) {
  if (!is_hexadecimal(expected)) return;
  if (expected.size() == 64) {
    state_ = std::make_unique<State>(EVP_sha256());
  } else if (expected.size() == 40) {
    state_ = std::make_unique<State>(EVP_sha1());
    const std::string header = concat("blob ", size);
    update(std::span(header.c_str(), header.size() + 1));
  }
}

Checksum::~Checksum() = default;
Checksum::Checksum(Checksum&&) noexcept = default;
Checksum& Checksum::operator=(Checksum&&) noexcept = default;

void Checksum::update(std::span<const char> bytes) {
  if (state_ != nullptr) EVP_DigestUpdate(state_->context, bytes.data(), bytes.size());
}

std::string Checksum::finish() {
  if (state_ == nullptr) return {};
  constexpr std::string_view kHex = "0123456789abcdef";
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  EVP_DigestFinal_ex(state_->context, digest.data(), &size);
  std::string text;
  for (const unsigned char byte : std::span(digest).first(size)) {
    text += kHex[byte >> 4];
    text += kHex[byte & 0xf];
  }
  return text;
}

}  // namespace krait::hub
