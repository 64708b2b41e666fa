// Where a machine keeps the certificates that it trusts. libcurl knows the place of the distribution that
// it was built on, and a wheel takes it to all others.
#pragma once

#include <filesystem>
#include <functional>

namespace krait::hub {

// The first that `usable` takes: `built_in_file`, the bundles of the usual distributions, `built_in_folder`
// (both libcurl's own, empty where it has none), the usual folder. Empty if it takes none of them.
[[nodiscard]] std::filesystem::path choose_ca_bundle(
    const std::filesystem::path& built_in_file, const std::filesystem::path& built_in_folder,
    const std::function<bool(const std::filesystem::path&)>& usable);

// Whether `path` is a file that is not empty, or a folder with certificates by the names that OpenSSL looks
// them up by ("5ed36f99.0").
[[nodiscard]] bool holds_certificates(const std::filesystem::path& path);

}  // namespace krait::hub
