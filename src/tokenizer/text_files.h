// Text files and JSONL files as work for several threads: in ranges of some hundred kilobytes, without
// copying. A text file is one document; each line {"text": "..."} of a JSONL file (.jsonl, .ndjson) is one.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "krait/io/mapped_file.h"

namespace krait::tokenizer {

class TextFiles {
 public:
  struct Range {
    std::size_t file = 0;
    std::string_view bytes;
    bool ends_file = false;
  };
  enum class Cut : std::uint8_t {
    never,         // a text file is one range
    before_space,  // a text file is cut before white space that follows other text (see next_cut)
  };

  // Maps the files. Throws Error, naming the file and what was expected, where one cannot be read, is empty
  // or holds binary data.
  TextFiles(const std::vector<std::filesystem::path>& paths, Cut cut);

  [[nodiscard]] std::uint64_t total_bytes() const;
  // Ranges in order, file after file; nothing at the end.
  [[nodiscard]] std::optional<Range> next();

  // Calls `body(text, ends_document)` for each document in the range, or for the part of one that the range
  // is. Empty texts of a JSONL file are passed over. Throws Error naming file and line where a line is not
  // JSON with a "text". May be called on several threads at once.
  using Body = std::function<void(std::string_view text, bool ends_document)>;
  void for_each_text(const Range& range, const Body& body) const;

  [[nodiscard]] static bool is_jsonl(const std::filesystem::path& path);

 private:
  void for_each_line(const Range& range, const Body& body) const;

  std::vector<std::shared_ptr<io::MappedFile>> files_;
  Cut cut_;
  std::size_t file_ = 0;      // of the next range
  std::size_t position_ = 0;  // where it begins
};

// The first place at or after `from` with ASCII white space that follows a character which is none (invalid
// bytes count as such), or the end of the text. GPT-2's pattern never matches across such a place, nor looks
// beyond it, so the pieces of a text are those of its parts.
[[nodiscard]] std::size_t next_cut(std::string_view text, std::size_t from);

}  // namespace krait::tokenizer
