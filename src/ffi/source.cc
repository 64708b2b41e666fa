// Where models and tokenizers come from: a directory, the hub, or this library.
#include <filesystem>
#include <functional>
#include <memory>

#include "ffi/model.h"

namespace krait::ffi {

hub::Options hub_options(const SourceOptions& options) {
  hub::Options made = hub::options_from_environment();
  if (options.cache_dir.has_value()) made.cache = text_of(*options.cache_dir);
  if (options.offline) made.offline = *options.offline;
  if (options.progress)
    made.progress = [bar = std::make_shared<hub::ProgressBar>()](const hub::Progress& p) { (*bar)(p); };
  made.cancelled = options.cancelled;
  made.log = options.log;
  return made;
}

std::string with_revision(const std::string& name, const OptionalWord& revision) {
  std::error_code ignored;
  if (!revision.has_value() || name.empty() || std::filesystem::exists(name, ignored)) return name;
  return name + "@" + text_of(*revision);
}

ModelFiles open_source(const std::string& name, const SourceOptions& options) {
  return open_model(with_revision(name, options.revision), hub_options(options));
}

namespace {

// Whether downloads have anything to check a server by.
bool has_certificates() {
  // The machine's first: the environment costs reading files.
  return !hub::system_ca_bundle().empty() || !hub::options_from_environment().ca_bundle.empty();
}

}  // namespace

}  // namespace krait::ffi

KRAIT_FFI(has_certificates, krait::ffi::has_certificates)
