// The hub: models by name, fetched once and kept in the cache that huggingface_hub uses, so that
// what Python has downloaded is found here and the other way round.
//
//   hub::Options options = hub::options_from_environment();
//   hub::ProgressBar bar;
//   options.progress = std::ref(bar);
//   const std::filesystem::path model = hub::download(*hub::parse_model_id("state-spaces/mamba-130m"),
//   options);
//
// The cache, below Options::cache (huggingface_hub's documentation, "Manage your cache"):
//   models--<org>--<name>/blobs/<etag>                 contents, named by their checksum
//   models--<org>--<name>/blobs/<etag>.incomplete      a download that broke off; the next one goes on from
//   there models--<org>--<name>/snapshots/<commit>/<file>    relative links to blobs
//   models--<org>--<name>/refs/<revision>              the commit that a branch or tag stood for
//   models--<org>--<name>/.no_exist/<commit>/<file>    empty: the hub has no such file at that commit
//   .locks/models--<org>--<name>/<etag>.lock           held (flock) by the process that fetches the blob
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "krait/core/context.h"

namespace krait::hub {

// A repository and a branch, tag or commit of it.
struct ModelId {
  std::string repo;  // "org/name" or "name"
  std::string revision = "main";
};

// "org/name", "org/name@revision" or "name"; nothing if `text` has not that form (a path such as
// "./model" or "/data/model" has not). The rules for names are the hub's: letters, digits, "-", "_"
// and ".", at most 96 of them, neither "--" nor ".." in them.
[[nodiscard]] std::optional<ModelId> parse_model_id(std::string_view text);

// How far the download of one file has come. `file` lives as long as the call.
struct Progress {
  std::string_view file;
  std::uint64_t bytes_done = 0;  // of this file; begins above 0 where an earlier download goes on
  std::uint64_t bytes_total = 0;
  bool complete = false;  // all bytes have come, the checksum is right, the file is in its place
  int files_done = 0;     // with this one once it is complete
  int files_total = 0;    // those that have to be fetched; what the cache has is not counted
};

enum class Parts {
  model,      // configuration, weights and, where the repository has one, the tokenizer
  tokenizer,  // tokenizer.json and the small files beside it, no weights
};

struct Options {
  std::string endpoint = "https://huggingface.co";
  std::string token;            // sent to the endpoint only, never to where it redirects; empty: none
  std::filesystem::path cache;  // must be given
  // Trusted certificates (PEM): a file, or folders separated by ":"; empty: system_ca_bundle().
  std::filesystem::path ca_bundle;
  bool offline = false;  // never touch the network
  Parts parts = Parts::model;

  std::function<void(const Progress&)> progress;  // called often, from the calling thread
  std::function<bool()> cancelled;                // asked at least once a second; true: stop
  std::function<void(LogLevel, std::string_view message)> log;

  std::chrono::milliseconds connect_timeout{10'000};
  std::chrono::seconds stall_timeout{30};      // below 100 bytes a second for so long is a broken connection
  int retries = 5;                             // in a row that bring less than 1 MiB
  std::chrono::milliseconds retry_delay{500};  // before the first retry; doubles with each, up to 16 times
  std::chrono::seconds longest_wait{60};       // that a server may ask for (Retry-After)
};

// What the environment says, as huggingface_hub reads it:
//   cache     HF_HUB_CACHE, else $HF_HOME/hub, else $XDG_CACHE_HOME/huggingface/hub, else
//             ~/.cache/huggingface/hub; empty where not even HOME is set
//   endpoint  HF_ENDPOINT
//   token     HF_TOKEN, else the file HF_TOKEN_PATH, else the file $HF_HOME/token (or its default place)
//   offline   HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is 1, on, yes or true
//   ca_bundle REQUESTS_CA_BUNDLE, else CURL_CA_BUNDLE, else SSL_CERT_FILE, else SSL_CERT_DIR
// Proxies are libcurl's matter: http_proxy, https_proxy, all_proxy and no_proxy.
[[nodiscard]] Options options_from_environment();

// The certificates that this machine trusts: the file that libcurl was built to use, else the first bundle
// or folder that is there of those where distributions keep them; empty if none is.
[[nodiscard]] std::filesystem::path system_ca_bundle();

// The directory of a snapshot of `id`, with everything in it that Options::parts asks for; fetches
// what the cache lacks. The weights are model.safetensors, else the shards that
// model.safetensors.index.json names, else pytorch_model.bin, else the shards of its index.
//
// A commit (40 hexadecimal digits) that the cache has needs no network. For a branch or tag the hub
// is asked; when it cannot be reached, or refuses, what the cache knows under that name is returned
// with a warning. Every file is checked against its checksum, SHA-256 or Git's SHA-1, before it takes
// its place. Several threads and processes may ask for the same model at once: one downloads.
//
// Throws Error(invalid_argument) for an id or option that cannot be, and where the repository holds
// nothing that Krait reads; Error(not_found) for a repository, revision or file that does not exist,
// or that the cache lacks when offline; Error(network) where the hub cannot be reached, refuses, or
// sends something else than it announced; Error(io) where the disk is full or the cache cannot be
// written; Error(interrupted) after `cancelled` said so. What has arrived is kept for the next time.
std::filesystem::path download(const ModelId& id, const Options& options);

// The snapshot in the cache, if it has the configuration and all weights (or the tokenizer, for
// Parts::tokenizer). Never touches the network, never writes.
[[nodiscard]] std::optional<std::filesystem::path> find_cached(const ModelId& id, const Options& options);

// Shows progress on a terminal as a bar that is redrawn ten times a second, and anywhere else as one
// line a file when it is complete. Pass it as Options::progress by std::ref.
class ProgressBar {
 public:
  explicit ProgressBar(int descriptor = 2);
  // Ends the line of a bar that did not come to its end.
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void operator()(const Progress& progress);

 private:
  using Clock = std::chrono::steady_clock;

  void write(std::string_view text) const;

  int descriptor_;
  bool terminal_;
  bool line_open_ = false;
  std::string file_;               // the one under way, empty between files
  std::uint64_t first_bytes_ = 0;  // it had when it began
  Clock::time_point began_;
  Clock::time_point drawn_;
};

}  // namespace krait::hub
