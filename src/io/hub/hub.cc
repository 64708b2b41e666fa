#include "krait/io/hub.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "io/hub/cache.h"
#include "io/hub/http.h"
#include "io/hub/names.h"
#include "io/hub/partial_blob.h"
#include "io/hub/retry.h"
#include "io/hub/selection.h"
#include "io/json.h"
#include "io/text.h"

namespace krait::hub {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kLongestAnswer = std::size_t{64} << 20;  // JSON on a repository with very many files
constexpr std::uintmax_t kLongestIndex = std::uintmax_t{64} << 20;
constexpr int kDeepestAnswer = 100;
constexpr std::uint64_t kWorthwhile = std::uint64_t{1} << 20;  // a try that brings so much was no failure

std::string text_of(const ModelId& id) { return id.repo + "@" + id.revision; }

std::string in_megabytes(std::uint64_t bytes) { return concat((bytes + 999'999) / 1'000'000, " MB"); }

void log(const Options& options, LogLevel level, const std::string& message) {
  if (options.log) options.log(level, message);
}

void check(const ModelId& id, const Options& options) {
  require(is_repo_name(id.repo), io::printable(id.repo), " is no name of a repository, expected org/name");
  require(is_revision(id.revision), id.repo, ": ", io::printable(id.revision),
          " is no branch, tag or commit");
  require(!options.cache.empty(), "no folder for downloads: set HF_HOME or HF_HUB_CACHE");
}

std::string read_index(const fs::path& path) {
  std::error_code error;
  const std::uintmax_t size = fs::file_size(path, error);
  if (error) fail(ErrorKind::io, path.string(), ": cannot be read: ", error.message());
  require(size <= kLongestIndex, path.string(), ": has ", size, " bytes, too many for an index of shards");
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool has_weights(const Cache& cache, const std::string& commit) {
  const Weights weights = choose_weights([&](std::string_view file) { return cache.has(commit, file); });
  if (!weights.sharded) return !weights.file.empty();
  const fs::path index = cache.snapshot(commit) / weights.file;
  const std::vector<std::string> shards = shards_of(read_index(index), index.string());
  return std::ranges::all_of(shards, [&](const std::string& file) { return cache.has(commit, file); });
}

// Whether the snapshot can be used: what must be there is.
bool is_usable(const Cache& cache, const std::string& commit, Parts parts) {
  return cache.has(commit, required_file(parts)) && (parts == Parts::tokenizer || has_weights(cache, commit));
}

// Whether asking the hub would bring nothing: what may be there is too, or is known not to exist.
bool is_complete(const Cache& cache, const std::string& commit, Parts parts) {
  return is_usable(cache, commit, parts) &&
         std::ranges::all_of(optional_files(parts), [&](std::string_view file) {
           return cache.has(commit, file) || cache.lacks(commit, file);
         });
}

std::optional<std::string> cached_commit(const Cache& cache, const ModelId& id, Parts parts) {
  std::optional<std::string> commit = cache.commit_of(id.revision);
  if (!commit || !is_usable(cache, *commit, parts)) return std::nullopt;
  return commit;
}

struct RemoteFile {
  std::string name;
  std::string etag;
  std::uint64_t size = 0;
};

struct Listing {
  std::string commit;
  std::set<std::string, std::less<>> files;
};

// One download of one model. The methods stand in the order in which they happen.
class Download {
 public:
  Download(const ModelId& id, const Options& options, const Cache& cache)
      : id_(id), options_(options), cache_(cache), http_(options), endpoint_(options.endpoint) {
    while (endpoint_.ends_with('/')) endpoint_.pop_back();
  }

  // Asks the hub what the revision is and holds.
  Listing ask(int retries);
  // Brings what the cache lacks of it.
  void fetch(const Listing& listing);

 private:
  template <typename Try>
  auto with_retries(int retries, Try attempt);
  [[noreturn]] void fail_status(const Response& response, const std::string& file);
  [[noreturn]] void fail_missing(const Response& response, const std::string& file);
  std::vector<std::string> choose(const Listing& listing);
  std::string address_of(const std::string& file) const;
  RemoteFile inspect(const std::string& file);
  void check_space(const std::vector<RemoteFile>& files) const;
  void fetch_all(const std::vector<std::string>& names, bool report);
  bool has_blob(const RemoteFile& file) const;
  void fetch_one(const RemoteFile& file);
  void receive(const RemoteFile& file);
  void transfer(const RemoteFile& file, PartialBlob& blob);
  void accept(const Response& response, const RemoteFile& file, PartialBlob& blob) const;
  void report(const RemoteFile& file, std::uint64_t bytes, bool complete = false) const;

  const ModelId& id_;
  const Options& options_;
  const Cache& cache_;
  Http http_;
  std::string endpoint_;
  std::string commit_;
  bool reporting_ = false;
  int files_done_ = 0;
  int files_total_ = 0;
};

template <typename Try>
auto Download::with_retries(int retries, Try attempt) {
  for (Retry retry(options_, retries);;) {
    try {
      return attempt();
    } catch (const TransientError& error) {
      retry.after(error);
    }
  }
}

Listing Download::ask(int retries) {
  const std::string url =
      endpoint_ + "/api/models/" + id_.repo + "/revision/" + percent_encoded(id_.revision);
  std::string body;
  const Response response = with_retries(retries, [&] { return http_.get(url, kLongestAnswer, body); });
  if (!response.ok()) fail_status(response, {});
  const std::string what = concat(origin_of(response.url), ": the answer on ", text_of(id_));
  Listing listing;
  try {
    const nlohmann::json json = io::parse_json(body, kDeepestAnswer, what);
    listing.commit = json.at("sha").get<std::string>();
    for (const nlohmann::json& file : json.at("siblings"))
      listing.files.insert(file.at("rfilename").get<std::string>());
  } catch (const nlohmann::json::exception&) {
    fail(ErrorKind::network, what, " lacks the commit (sha) or the files (siblings): is this a hub?");
  } catch (const Error& error) {
    // A login page of the network in between, say: not the caller's mistake.
    fail(ErrorKind::network, error.what());
  }
  if (!is_commit(listing.commit) || (is_commit(id_.revision) && listing.commit != id_.revision))
    fail(ErrorKind::network, what, " names the commit ", io::printable(listing.commit), ", expected ",
         is_commit(id_.revision) ? id_.revision : "40 hexadecimal digits");
  return listing;
}

// `file` is empty where the question was about the repository and revision.
void Download::fail_status(const Response& response, const std::string& file) {
  const std::string what = file.empty() ? text_of(id_) : concat(text_of(id_), ": ", file);
  switch (response.status) {
    case 401:
      if (!options_.token.empty())
        fail(ErrorKind::network, what,
             ": the hub refuses the token (HTTP 401): HF_TOKEN is not valid, or the "
             "repository does not exist");
      fail(ErrorKind::network, what,
           ": the hub wants to know who asks (HTTP 401): the repository is gated or private, "
           "and needs HF_TOKEN, or does not exist");
    case 403:
      fail(ErrorKind::network, what,
           ": access denied (HTTP 403): the repository is gated or private; accept its "
           "conditions at ",
           origin_of(endpoint_), "/", id_.repo, " and set HF_TOKEN to a token that may read it");
    case 404: fail_missing(response, file);
    default:
      fail(ErrorKind::network, what, ": ", origin_of(response.url),
           " answers with an unexpected status (HTTP ", response.status, ")");
  }
}

void Download::fail_missing(const Response& response, const std::string& file) {
  std::string_view code = response.header("x-error-code");
  if (code.empty() && !file.empty()) code = "EntryNotFound";
  if (code.empty()) {
    // Mirrors do not tell which of the two is missing; the repository alone can be asked for.
    std::string body;
    const Response answer = with_retries(options_.retries, [&] {
      return http_.get(endpoint_ + "/api/models/" + id_.repo, kLongestAnswer, body);
    });
    code = answer.ok() ? "RevisionNotFound" : "RepoNotFound";
  }
  if (code == "EntryNotFound")
    fail(ErrorKind::not_found, text_of(id_), ": has no file ", io::printable(file));
  if (code == "RevisionNotFound")
    fail(ErrorKind::not_found, id_.repo, ": has no revision ", io::printable(id_.revision));
  fail(ErrorKind::not_found, id_.repo, ": no such repository at ", origin_of(endpoint_));
}

void Download::fetch(const Listing& listing) {
  commit_ = listing.commit;
  const std::vector<std::string> names = choose(listing);
  fetch_all(names, true);
  for (const std::string_view file : optional_files(options_.parts))
    if (!listing.files.contains(file)) {
      try {
        cache_.note_lack(commit_, file);
      } catch (const Error& error) {
        // Only costs a question to the hub the next time.
        log(options_, LogLevel::debug, error.what());
      }
    }
}

// Small files first and weights last, so that weights in a snapshot mean that the rest is there.
std::vector<std::string> Download::choose(const Listing& listing) {
  const auto has = [&](std::string_view file) { return listing.files.contains(file); };
  std::vector<std::string> names;
  const std::string required(required_file(options_.parts));
  require(has(required), text_of(id_), ": has no ", required);
  names.push_back(required);
  for (const std::string_view file : optional_files(options_.parts))
    if (has(file)) names.emplace_back(file);
  if (options_.parts == Parts::tokenizer) return names;
  // Weights of the same commit in another format are as good.
  if (has_weights(cache_, commit_)) return names;
  const Weights weights = choose_weights(has);
  require(!weights.file.empty(), text_of(id_),
          ": has no weights in a format that Krait reads (model.safetensors or pytorch_model.bin, whole or "
          "in shards)");
  names.push_back(weights.file);
  if (!weights.sharded) return names;
  fetch_all({weights.file}, false);
  const std::string what = concat(text_of(id_), ": ", weights.file);
  for (const std::string& shard : shards_of(read_index(cache_.snapshot(commit_) / weights.file), what)) {
    require(has(shard), what, ": names the shard ", io::printable(shard),
            ", which the repository does not have");
    names.push_back(shard);
  }
  return names;
}

std::string Download::address_of(const std::string& file) const {
  return endpoint_ + "/" + id_.repo + "/resolve/" + commit_ + "/" + percent_encoded(file, "/");
}

RemoteFile Download::inspect(const std::string& file) {
  const Response response = with_retries(options_.retries, [&] { return http_.head(address_of(file)); });
  // A redirect to storage elsewhere is a good answer too: its headers describe what lies there.
  if (response.status >= 400) fail_status(response, file);
  const std::string what = concat(text_of(id_), ": ", file);
  const std::string_view linked = response.header("x-linked-etag");
  std::optional<std::uint64_t> size = response.number("x-linked-size");
  if (!size) size = response.number("content-length");
  RemoteFile remote{.name = file, .etag = strip_etag(linked.empty() ? response.header("etag") : linked)};
  if (!is_safe_etag(remote.etag))
    fail(ErrorKind::network, what, ": the hub gives the ETag ", io::printable(remote.etag),
         ", expected a checksum");
  if (!size) fail(ErrorKind::network, what, ": the hub does not tell its size");
  const std::string_view commit = response.header("x-repo-commit");
  if (!commit.empty() && commit != commit_)
    fail(ErrorKind::network, what, ": the hub gives it from commit ", io::printable(commit), ", expected ",
         commit_);
  remote.size = *size;
  return remote;
}

void Download::check_space(const std::vector<RemoteFile>& files) const {
  std::uint64_t needed = 0;
  for (const RemoteFile& file : files) {
    if (has_blob(file)) continue;
    std::error_code absent;
    const std::uintmax_t there = fs::file_size(cache_.blob(file.etag + ".incomplete"), absent);
    const std::uint64_t missing = absent || there > file.size ? file.size : file.size - there;
    needed = missing > UINT64_MAX - needed ? UINT64_MAX : needed + missing;
  }
  const std::uint64_t free = cache_.free_bytes();
  if (needed > free)
    fail(ErrorKind::io, options_.cache.string(), ": the disk is too full for ", text_of(id_), ": it needs ",
         in_megabytes(needed), ", free are ", in_megabytes(free));
}

void Download::fetch_all(const std::vector<std::string>& names, bool reporting) {
  std::vector<RemoteFile> files;
  for (const std::string& name : names)
    if (!cache_.has(commit_, name)) files.push_back(inspect(name));
  if (files.empty()) return;
  cache_.prepare(commit_);
  check_space(files);
  reporting_ = reporting;
  files_done_ = 0;
  files_total_ = static_cast<int>(files.size());
  for (const RemoteFile& file : files) fetch_one(file);
}

bool Download::has_blob(const RemoteFile& file) const {
  std::error_code absent;
  return fs::file_size(cache_.blob(file.etag), absent) == file.size && !absent;
}

void Download::fetch_one(const RemoteFile& file) {
  const FileLock lock(cache_.lock(file.etag), file.name, options_);
  if (!has_blob(file)) receive(file);
  cache_.link(commit_, file.name, file.etag);
  ++files_done_;
  report(file, file.size, true);
}

void Download::receive(const RemoteFile& file) {
  for (bool again = false;; again = true) {
    PartialBlob blob(cache_.blob(file.etag + ".incomplete"), file.etag, file.size);
    const bool resumed = blob.size() > 0;
    report(file, blob.size());
    transfer(file, blob);
    const PartialBlob::Verdict verdict = blob.verdict();
    if (verdict == PartialBlob::Verdict::unknown)
      log(options_, LogLevel::warning,
          concat(file.name, ": the hub gives no checksum (ETag ", file.etag, "), only its size was checked"));
    if (verdict != PartialBlob::Verdict::wrong) {
      blob.commit(cache_.blob(file.etag));
      return;
    }
    blob.discard();
    // What an earlier run left may be to blame, so one download from the beginning is due.
    if (!resumed || again)
      fail(ErrorKind::network, text_of(id_), ": ", file.name, ": what arrived has not the checksum ",
           file.etag, " that the hub announced; it was removed");
    log(options_, LogLevel::warning, file.name + ": what an earlier download left is damaged, starting anew");
  }
}

void Download::transfer(const RemoteFile& file, PartialBlob& blob) {
  Retry retry(options_, options_.retries);
  std::uint64_t furthest = blob.size();
  while (!blob.complete()) {
    try {
      bool begun = false;
      const Response response = http_.get(
          address_of(file.name), blob.size(), [&](const Response& head, std::span<const char> bytes) {
            if (!begun) accept(head, file, blob);
            begun = true;
            if (bytes.size() > file.size - blob.size())
              fail(ErrorKind::network, text_of(id_), ": ", file.name, ": the server sends more than the ",
                   file.size, " bytes that the hub announced");
            blob.append(bytes);
            report(file, blob.size());
          });
      if (response.status == 416) {
        blob.restart();
        throw TransientError(
            concat(origin_of(response.url), " has no such part of ", file.name, " (HTTP 416)"));
      }
      if (!response.ok()) fail_status(response, file.name);
      if (!blob.complete())
        throw TransientError(concat(origin_of(response.url), " ends ", file.name, " after ", blob.size(),
                                    " of ", file.size, " bytes"));
    } catch (const TransientError& error) {
      if (blob.size() >= furthest + kWorthwhile) retry.reset();
      furthest = std::max(furthest, blob.size());
      retry.after(error);
    }
  }
}

// Checks that the body that begins now is what has to be appended to `blob`.
void Download::accept(const Response& response, const RemoteFile& file, PartialBlob& blob) const {
  if (response.status == 206) {
    const std::string expected = concat("bytes ", blob.size(), "-", file.size - 1, "/", file.size);
    if (response.header("content-range") == expected) return;
    blob.restart();
    throw TransientError(concat(origin_of(response.url), " sends the range ",
                                io::printable(response.header("content-range")), " of ", file.name,
                                ", expected ", expected));
  }
  if (blob.size() > 0) blob.restart();  // the whole comes, although a part was asked for
  const std::optional<std::uint64_t> length = response.number("content-length");
  if (length && *length != file.size)
    fail(ErrorKind::network, text_of(id_), ": ", file.name, ": the server sends ", *length,
         " bytes, the hub announced ", file.size);
}

void Download::report(const RemoteFile& file, std::uint64_t bytes, bool complete) const {
  if (!reporting_ || !options_.progress) return;
  options_.progress({.file = file.name,
                     .bytes_done = bytes,
                     .bytes_total = file.size,
                     .complete = complete,
                     .files_done = files_done_,
                     .files_total = files_total_});
}

}  // namespace

std::optional<fs::path> find_cached(const ModelId& id, const Options& options) {
  check(id, options);
  const Cache cache(options.cache, id.repo);
  const std::optional<std::string> commit = cached_commit(cache, id, options.parts);
  if (!commit) return std::nullopt;
  return cache.snapshot(*commit);
}

fs::path download(const ModelId& id, const Options& options) {
  check(id, options);
  const Cache cache(options.cache, id.repo);
  const std::optional<std::string> cached = cached_commit(cache, id, options.parts);
  if (cached && (options.offline || (is_commit(id.revision) && is_complete(cache, *cached, options.parts))))
    return cache.snapshot(*cached);
  if (options.offline)
    fail(ErrorKind::not_found, text_of(id), ": is not in ", options.cache.string(),
         ", and HF_HUB_OFFLINE forbids to fetch it");

  Download download(id, options, cache);
  Listing listing;
  try {
    // Who has the model need not wait for a hub that is away.
    listing = download.ask(cached ? 0 : options.retries);
  } catch (const Error& error) {
    if (!cached || error.kind() != ErrorKind::network) throw;
    log(options, LogLevel::warning,
        concat(error.what(), "; using ", id.repo, " from the cache, commit ", *cached));
    return cache.snapshot(*cached);
  }
  download.fetch(listing);
  if (listing.commit != id.revision && cache.commit_of(id.revision) != listing.commit) {
    try {
      cache.write_ref(id.revision, listing.commit);
    } catch (const Error& error) {
      log(options, LogLevel::warning, concat(error.what(), "; ", text_of(id), " will not be found offline"));
    }
  }
  return cache.snapshot(listing.commit);
}

}  // namespace krait::hub
