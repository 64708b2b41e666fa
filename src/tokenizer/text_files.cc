#include "tokenizer/text_files.h"

#include <algorithm>
#include <string>

#include "io/json.h"
#include "krait/core/error.h"
#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kRangeBytes = std::size_t{256} << 10;
constexpr int kMaxJsonDepth = 64;

bool is_ascii_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

bool space_ends_at(std::string_view text, std::size_t end) {
  if (static_cast<unsigned char>(text[end - 1]) < 0x80) return is_ascii_space(text[end - 1]);
  // The longest white space has three bytes.
  for (std::size_t length = 2; length <= std::min<std::size_t>(3, end); ++length) {
    const Utf8Step step = utf8_step(text, end - length);
    if (step.kind == Utf8Step::Kind::valid && step.length == length)
      return is_space(code_point_at(text, end - length).value);
  }
  return false;
}

// Compressed files and arrays have a zero byte soon; text has none.
void require_text(std::string_view bytes, const fs::path& path) {
  require(!bytes.empty(), path.string(), ": is empty, expected text");
  const std::size_t zero = bytes.substr(0, kRangeBytes).find('\0');
  require(zero == std::string_view::npos, path.string(), ": holds binary data (byte ", zero,
          " is zero), expected text");
}

// The text of one line of a JSONL file. Messages of Errors go on after "line N".
std::string text_of_line(std::string_view line) {
  nlohmann::json value = io::parse_json(line, kMaxJsonDepth, "");
  const auto text = value.find("text");  // end() for what is no object
  require(text != value.end() && text->is_string(),
          " has no text, expected an object with \"text\": \"...\"");
  return std::move(text->get_ref<std::string&>());
}

}  // namespace

std::size_t next_cut(std::string_view text, std::size_t from) {
  for (std::size_t at = std::max<std::size_t>(from, 1); at < text.size(); ++at)
    if (is_ascii_space(text[at]) && !space_ends_at(text, at)) return at;
  return text.size();
}

bool TextFiles::is_jsonl(const fs::path& path) {
  return path.extension() == ".jsonl" || path.extension() == ".ndjson";
}

TextFiles::TextFiles(const std::vector<fs::path>& paths, Cut cut) : cut_(cut) {
  for (const fs::path& path : paths) {
    files_.push_back(io::MappedFile::open(path));
    require_text(files_.back()->text(), path);
  }
}

std::uint64_t TextFiles::total_bytes() const {
  std::uint64_t total = 0;
  for (const auto& file : files_) total += file->bytes().size();
  return total;
}

std::optional<TextFiles::Range> TextFiles::next() {
  if (file_ == files_.size()) return std::nullopt;
  const std::string_view text = files_[file_]->text();
  std::size_t end = text.size();
  if (text.size() - position_ > kRangeBytes) {
    if (is_jsonl(files_[file_]->path())) {
      const std::size_t newline = text.find('\n', position_ + kRangeBytes);
      if (newline != std::string_view::npos) end = newline + 1;
    } else if (cut_ == Cut::before_space) {
      end = next_cut(text, position_ + kRangeBytes);
    }
  }
  const Range range{file_, text.substr(position_, end - position_), end == text.size()};
  position_ = end;
  if (range.ends_file) {
    ++file_;
    position_ = 0;
  }
  return range;
}

void TextFiles::for_each_text(const Range& range, const Body& body) const {
  if (is_jsonl(files_[range.file]->path()))
    for_each_line(range, body);
  else
    body(range.bytes, range.ends_file);
}

void TextFiles::for_each_line(const Range& range, const Body& body) const {
  std::string_view rest = range.bytes;
  while (!rest.empty()) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    std::string text;
    try {
      text = text_of_line(line);
    } catch (const Error& error) {
      // Lines are counted only where one has to be named.
      const char* begin = files_[range.file]->text().data();
      fail(error.kind(), files_[range.file]->path().string(), ": line ",
           std::count(begin, line.data(), '\n') + 1, error.what());
    }
    if (!text.empty()) body(text, true);
  }
}

}  // namespace krait::tokenizer
