#include "io/hub/http.h"

#include <curl/curl.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <new>

#include "io/hub/retry.h"
#include "io/text.h"

namespace krait::hub {
namespace {

constexpr int kMostRedirects = 10;
constexpr long kSlowest = 100;        // bytes a second; less for Options::stall_timeout is broken
constexpr long kBuffer = 256 * 1024;  // of libcurl
constexpr std::size_t kLongestErrorBody = 64 * 1024;  // read to keep the connection; beyond it is dropped

struct List {
  curl_slist* head = nullptr;
  List() = default;
  ~List() { curl_slist_free_all(head); }
  List(const List&) = delete;
  List& operator=(const List&) = delete;

  void add(const std::string& line) {
    curl_slist* longer = curl_slist_append(head, line.c_str());
    if (longer == nullptr) throw std::bad_alloc();
    head = longer;
  }
};

template <typename Value>
void set(CURL* easy, CURLoption option, Value value) {
  const CURLcode code = curl_easy_setopt(easy, option, value);
  if (code == CURLE_OUT_OF_MEMORY) throw std::bad_alloc();
  if (code != CURLE_OK)
    fail(ErrorKind::network, "libcurl does not take option ", static_cast<int>(option), ": ",
         curl_easy_strerror(code));
}

CURL* new_handle() {
  // Once for the process; a local static because older libcurls do not guard against threads.
  static const CURLcode ready = curl_global_init(CURL_GLOBAL_DEFAULT);
  if (ready != CURLE_OK) fail(ErrorKind::network, "libcurl does not start: ", curl_easy_strerror(ready));
  CURL* easy = curl_easy_init();
  if (easy == nullptr) throw std::bad_alloc();
  return easy;
}

// Failures that a change of weather can end. What is missing here (certificates, malformed addresses)
// fails the same way each time.
bool is_transient(CURLcode code) {
  switch (code) {
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_WEIRD_SERVER_REPLY:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM:
    case CURLE_PARTIAL_FILE:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR: return true;
    default: return false;
  }
}

bool is_transient(int status) {
  return status == 408 || status == 429 || status == 500 || status == 502 || status == 503 || status == 504;
}

bool is_redirect(int status) {
  return status == 301 || status == 302 || status == 303 || status == 307 || status == 308;
}

void read_headers(CURL* easy, Response& response) {
  curl_header* header = nullptr;
  while ((header = curl_easy_nextheader(easy, CURLH_HEADER, -1, header)) != nullptr) {
    std::string name = header->name;
    std::ranges::transform(name, name.begin(), [](char c) {
      return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    });
    response.headers[name] = header->value;
  }
}

std::string url_part(CURLU* url, CURLUPart part) {
  char* text = nullptr;
  if (curl_url_get(url, part, &text, CURLU_DEFAULT_PORT) != CURLUE_OK) return {};
  std::string out = text;
  curl_free(text);
  return out;
}

std::string without_line_breaks(std::string text) {
  std::ranges::replace_if(
      text, [](char c) { return static_cast<unsigned char>(c) < 0x20; }, ' ');
  return text;
}

}  // namespace

std::string_view Response::header(const std::string& name) const {
  const auto found = headers.find(name);
  return found == headers.end() ? std::string_view{} : found->second;
}

std::optional<std::uint64_t> Response::number(const std::string& name) const {
  const std::string_view text = header(name);
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::string origin_of(const std::string& url) {
  const std::unique_ptr<CURLU, decltype(&curl_url_cleanup)> parsed(curl_url(), &curl_url_cleanup);
  if (parsed == nullptr) throw std::bad_alloc();
  if (curl_url_set(parsed.get(), CURLUPART_URL, url.c_str(), CURLU_NON_SUPPORT_SCHEME) != CURLUE_OK)
    return {};
  const std::string scheme = url_part(parsed.get(), CURLUPART_SCHEME);
  const std::string port = url_part(parsed.get(), CURLUPART_PORT);
  std::string origin = scheme + "://" + url_part(parsed.get(), CURLUPART_HOST);
  const bool usual = (scheme == "https" && port == "443") || (scheme == "http" && port == "80");
  if (!usual && !port.empty()) origin += ":" + port;
  return origin;
}

struct Http::Handles {
  CURL* easy = new_handle();
  List anonymous;   // headers for everybody
  List authorized;  // for the endpoint
  bool has_certificates = false;
  std::array<char, CURL_ERROR_SIZE> message{};

  Handles() = default;
  ~Handles() { curl_easy_cleanup(easy); }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
};

// What the callbacks need to know. Exceptions must not cross libcurl: they wait here.
struct Http::Transfer {
  const Options& options;
  CURL* easy;
  const Receive& receive;
  Response response{};
  std::size_t ignored = 0;
  std::exception_ptr thrown{};

  void read_head() {
    if (response.status != 0) return;
    long status = 0;
    curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
    response.status = static_cast<int>(status);
    read_headers(easy, response);
  }
};

Http::Http(const Options& options)
    : options_(options),
      endpoint_origin_(origin_of(options.endpoint)),
      handles_(std::make_unique<Handles>()) {
  require(options.endpoint.starts_with("https://") || options.endpoint.starts_with("http://"),
          "HF_ENDPOINT is ", io::printable(options.endpoint),
          ", expected an address such as https://huggingface.co");
  require(!endpoint_origin_.empty(), "HF_ENDPOINT is ", io::printable(options.endpoint),
          ", which is no address");
  require(std::ranges::all_of(options.token, [](char c) { return c > 0x20 && c < 0x7f; }),
          "HF_TOKEN has characters that no token has (spaces, line breaks or beyond ASCII)");
  CURL* easy = handles_->easy;
  for (List* list : {&handles_->anonymous, &handles_->authorized}) {
    list->add("User-Agent: krait");
    // Compressed bodies would have another length and another checksum.
    list->add("Accept-Encoding: identity");
  }
  if (!options.token.empty()) handles_->authorized.add("Authorization: Bearer " + options.token);

  set(easy, CURLOPT_NOSIGNAL, 1L);
  set(easy, CURLOPT_PROTOCOLS_STR, "http,https");
  set(easy, CURLOPT_FOLLOWLOCATION, 0L);
  set(easy, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
  set(easy, CURLOPT_BUFFERSIZE, kBuffer);
  set(easy, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(options.connect_timeout.count()));
  set(easy, CURLOPT_LOW_SPEED_LIMIT, kSlowest);
  set(easy, CURLOPT_LOW_SPEED_TIME, static_cast<long>(options.stall_timeout.count()));
  set(easy, CURLOPT_NOPROGRESS, 0L);
  set(easy, CURLOPT_XFERINFOFUNCTION, &Http::on_progress);
  set(easy, CURLOPT_WRITEFUNCTION, &Http::on_body);
  set(easy, CURLOPT_ERRORBUFFER, handles_->message.data());
  set(easy, CURLOPT_SSL_VERIFYPEER, 1L);
  set(easy, CURLOPT_SSL_VERIFYHOST, 2L);
  const std::string bundle =
      options.ca_bundle.empty() ? system_ca_bundle().string() : options.ca_bundle.string();
  handles_->has_certificates = !bundle.empty();
  if (std::filesystem::is_directory(bundle.substr(0, bundle.find(':')))) {
    // The file that libcurl was built to use, which may not be here, would be read before any folder.
    set(easy, CURLOPT_CAINFO, nullptr);
    set(easy, CURLOPT_CAPATH, bundle.c_str());
  } else if (!bundle.empty()) {
    set(easy, CURLOPT_CAINFO, bundle.c_str());
  }
}

Http::~Http() = default;

Response Http::head(const std::string& url) { return follow(Method::head, url, 0, {}); }

Response Http::get(const std::string& url, std::size_t limit, std::string& body) {
  body.clear();
  return follow(Method::get, url, 0, [&](const Response& response, std::span<const char> bytes) {
    if (bytes.size() > limit - body.size())
      fail(ErrorKind::network, origin_of(response.url), " sends more than ", limit,
           " bytes where a short answer is expected");
    body.append(bytes.data(), bytes.size());
  });
}

Response Http::get(const std::string& url, std::uint64_t offset, const Receive& receive) {
  return follow(Method::get, url, offset, receive);
}

Response Http::follow(Method method, std::string url, std::uint64_t offset, const Receive& receive) {
  for (int redirects = 0; redirects <= kMostRedirects; ++redirects) {
    std::string target;
    Response response = perform(method, url, offset, receive, target);
    if (!is_redirect(response.status) || target.empty()) return response;
    if (!target.starts_with("https://") && !target.starts_with("http://"))
      fail(ErrorKind::network, origin_of(url), " redirects to ",
           io::printable(target.substr(0, target.find(':'))), ", expected http or https");
    const bool leaves = origin_of(target) != origin_of(url);
    if (method == Method::head && leaves && !response.header("x-linked-etag").empty() &&
        response.number("x-linked-size"))
      return response;
    url = std::move(target);
  }
  fail(ErrorKind::network, origin_of(url), " redirects more than ", kMostRedirects, " times");
}

Response Http::perform(Method method, const std::string& url, std::uint64_t offset, const Receive& receive,
                       std::string& redirect) {
  check_cancelled(options_);
  if (!handles_->has_certificates && url.starts_with("https://"))
    fail(ErrorKind::network, origin_of(url),
         ": this machine has no certificates to check it by, at none of the usual places below /etc/ssl and "
         "/etc/pki: install ca-certificates, or name a file of them in SSL_CERT_FILE");
  CURL* easy = handles_->easy;
  Transfer transfer{.options = options_, .easy = easy, .receive = receive};
  transfer.response.url = url;
  set(easy, CURLOPT_URL, url.c_str());
  if (method == Method::head) {
    set(easy, CURLOPT_NOBODY, 1L);
  } else {
    set(easy, CURLOPT_HTTPGET, 1L);
  }
  const std::string range = concat(offset, "-");
  set(easy, CURLOPT_RANGE, offset > 0 ? range.c_str() : nullptr);
  const bool trusted = origin_of(url) == endpoint_origin_;
  set(easy, CURLOPT_HTTPHEADER, trusted ? handles_->authorized.head : handles_->anonymous.head);
  set(easy, CURLOPT_WRITEDATA, &transfer);
  set(easy, CURLOPT_XFERINFODATA, &transfer);
  handles_->message[0] = '\0';

  const CURLcode code = curl_easy_perform(easy);
  if (transfer.thrown) std::rethrow_exception(transfer.thrown);
  if (code != CURLE_OK && transfer.ignored <= kLongestErrorBody) {
    const std::string detail =
        handles_->message[0] != '\0' ? handles_->message.data() : curl_easy_strerror(code);
    const std::string message = concat(origin_of(url), ": ", without_line_breaks(detail));
    // A hub that has never answered is out of reach rather than troubled: waiting would only keep the user
    // from learning it.
    const bool unreachable =
        !reached_ && (code == CURLE_COULDNT_RESOLVE_HOST || code == CURLE_COULDNT_RESOLVE_PROXY);
    if (is_transient(code) && !unreachable) throw TransientError(message);
    throw Error(ErrorKind::network, message);
  }
  reached_ = true;
  transfer.read_head();
  const int status = transfer.response.status;
  if (is_transient(status)) {
    curl_off_t seconds = 0;
    curl_easy_getinfo(easy, CURLINFO_RETRY_AFTER, &seconds);
    std::optional<std::chrono::seconds> retry_after;
    if (!transfer.response.header("retry-after").empty()) retry_after = std::chrono::seconds(seconds);
    throw TransientError(
        concat(origin_of(url),
               status == 429 ? " limits how often it may be asked (HTTP " : " answers with an error (HTTP ",
               status, ")"),
        retry_after);
  }
  char* target = nullptr;
  curl_easy_getinfo(easy, CURLINFO_REDIRECT_URL, &target);
  if (target != nullptr) redirect = target;
  return std::move(transfer.response);
}

std::size_t Http::on_body(char* data, std::size_t size, std::size_t count, void* pointer) {
  auto& transfer = *static_cast<Transfer*>(pointer);
  try {
    transfer.read_head();
    if (transfer.response.ok()) {
      if (transfer.receive) transfer.receive(transfer.response, std::span(data, size * count));
    } else {
      transfer.ignored += size * count;
      if (transfer.ignored > kLongestErrorBody) return 0;
    }
    return size * count;
  } catch (...) {
    transfer.thrown = std::current_exception();
    return 0;
  }
}

int Http::on_progress(void* pointer, std::int64_t, std::int64_t, std::int64_t, std::int64_t) {
  auto& transfer = *static_cast<Transfer*>(pointer);
  try {
    check_cancelled(transfer.options);
    return 0;
  } catch (...) {
    if (!transfer.thrown) transfer.thrown = std::current_exception();
    return 1;
  }
}

}  // namespace krait::hub
