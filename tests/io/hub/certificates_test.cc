#include "io/hub/certificates.h"

#include <gtest/gtest.h>

#include <set>

#include "io/scratch.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;

// The choice on a machine that has `paths`, of a libcurl that was built on Debian.
fs::path chosen(const std::set<fs::path>& paths) {
  return choose_ca_bundle("/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs",
                          [&](const fs::path& path) { return paths.contains(path); });
}

TEST(Certificates, EachDistributionHasItsPlace) {
  for (const char* bundle : {"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
                             "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/ca-bundle.pem",
                             "/var/lib/ca-certificates/ca-bundle.pem", "/etc/ssl/cert.pem", "/etc/ssl/certs"})
    EXPECT_EQ(chosen({bundle}), bundle);
}

TEST(Certificates, WhatLibcurlWasBuiltForComesFirstAndFoldersLast) {
  const auto all = [](const fs::path&) { return true; };
  EXPECT_EQ(choose_ca_bundle("/opt/curl/bundle.pem", "/opt/curl/certs", all), "/opt/curl/bundle.pem");
  EXPECT_EQ(choose_ca_bundle("", "/opt/curl/certs", all), "/etc/ssl/certs/ca-certificates.crt");
  EXPECT_EQ(chosen({"/etc/ssl/certs", "/etc/pki/tls/certs/ca-bundle.crt"}),
            "/etc/pki/tls/certs/ca-bundle.crt");
  EXPECT_EQ(
      choose_ca_bundle("", "/opt/curl/certs", [](const fs::path& path) { return !path.has_extension(); }),
      "/opt/curl/certs");
}

TEST(Certificates, NothingIsEmpty) {
  EXPECT_EQ(chosen({}), "");
  EXPECT_EQ(choose_ca_bundle("", "", [](const fs::path& path) { return path.empty(); }), "");
}

TEST(Certificates, OnlyWhatHoldsAnyCounts) {
  const io::Scratch scratch;
  EXPECT_FALSE(holds_certificates(scratch / "missing.pem"));
  EXPECT_FALSE(holds_certificates(scratch.put("empty.pem", "")));
  EXPECT_TRUE(holds_certificates(scratch.put("bundle.pem", "-----BEGIN CERTIFICATE-----")));
  const fs::path folder = scratch / "certs";
  fs::create_directory(folder);
  EXPECT_FALSE(holds_certificates(folder));
  scratch.put("certs/bundle.crt", "-----BEGIN CERTIFICATE-----");
  EXPECT_FALSE(holds_certificates(folder)) << "no name that OpenSSL looks for";
  scratch.put("certs/5ed36f99.0", "-----BEGIN CERTIFICATE-----");
  EXPECT_TRUE(holds_certificates(folder));
}

}  // namespace
}  // namespace krait::hub
