// Reads a tokenizer.json in one pass: the vocabulary and the merges, which are nearly all of it, go
// straight to flat memory, and the rest becomes a small JSON value.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/vocabulary.h"

namespace krait::tokenizer {

// Pairs of tokens, best first.
class MergeList {
 public:
  void add(std::string_view left, std::string_view right);
  [[nodiscard]] std::size_t size() const { return entries_.size(); }
  [[nodiscard]] std::string_view left(std::size_t i) const {
    return std::string_view(text_).substr(entries_[i].offset, entries_[i].left);
  }
  [[nodiscard]] std::string_view right(std::size_t i) const {
    return std::string_view(text_).substr(entries_[i].offset + entries_[i].left, entries_[i].right);
  }
  [[nodiscard]] std::string_view joined(std::size_t i) const {
    return std::string_view(text_).substr(entries_[i].offset, entries_[i].left + entries_[i].right);
  }

 private:
  struct Entry {
    std::size_t offset = 0;
    std::size_t left = 0;
    std::size_t right = 0;
  };
  std::string text_;
  std::vector<Entry> entries_;
};

struct JsonFile {
  nlohmann::json rest;    // all but the contents of model.vocab and model.merges
  Vocabulary vocabulary;  // indexed
  MergeList merges;
};

// Throws Error(invalid_argument), beginning with `name`, where `json` is not JSON, nests too deeply, has
// no model.vocab or model.merges, or has them in another form.
[[nodiscard]] JsonFile read_json_file(std::string_view json, std::string_view name);

}  // namespace krait::tokenizer
