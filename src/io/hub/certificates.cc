#include "io/hub/certificates.h"

#include <curl/curl.h>

#include <array>
#include <system_error>

#include "krait/io/hub.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;

constexpr std::array kBundles = {
    "/etc/ssl/certs/ca-certificates.crt",                 // Debian, Ubuntu, Arch, Gentoo, Alpine, NixOS
    "/etc/pki/tls/certs/ca-bundle.crt",                   // Fedora, RHEL
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  // the same, from Fedora 43 on alone
    "/etc/ssl/ca-bundle.pem",                             // openSUSE
    "/var/lib/ca-certificates/ca-bundle.pem",             // openSUSE MicroOS
    "/etc/ca-certificates/extracted/tls-ca-bundle.pem",   // Arch
    "/etc/pki/tls/cacert.pem",                            // OpenELEC
    "/etc/ssl/certs/ca-bundle.crt",                       // NixOS
    "/etc/ssl/cert.pem",                                  // Alpine, FreeBSD, macOS
    "/usr/local/share/certs/ca-root-nss.crt",             // FreeBSD
};
constexpr const char* kFolder = "/etc/ssl/certs";

}  // namespace

fs::path choose_ca_bundle(const fs::path& built_in_file, const fs::path& built_in_folder,
                          const std::function<bool(const fs::path&)>& usable) {
  if (!built_in_file.empty() && usable(built_in_file)) return built_in_file;
  for (const fs::path bundle : kBundles)
    if (usable(bundle)) return bundle;
  if (!built_in_folder.empty() && usable(built_in_folder)) return built_in_folder;
  if (usable(kFolder)) return kFolder;
  return {};
}

bool holds_certificates(const fs::path& path) {
  std::error_code error;
  if (!fs::is_directory(path, error))
    return fs::is_regular_file(path, error) && fs::file_size(path, error) > 0;
  for (auto entry = fs::directory_iterator(path, error); !error && entry != fs::directory_iterator();
       entry.increment(error))
    if (entry->path().extension() == ".0") return true;
  return false;
}

fs::path system_ca_bundle() {
  const curl_version_info_data* curl = curl_version_info(CURLVERSION_NOW);
  const auto path = [](const char* text) { return fs::path(text != nullptr ? text : ""); };
  // Older ones do not say what they were built for.
  if (curl->age < CURLVERSION_SEVENTH) return choose_ca_bundle({}, {}, holds_certificates);
  return choose_ca_bundle(path(curl->cainfo), path(curl->capath), holds_certificates);
}

}  // namespace krait::hub
