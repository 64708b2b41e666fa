// The normalizers of a tokenizer.json: NFC, Prepend, Replace and Sequence.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/pattern.h"

namespace krait::tokenizer {

class Normalizer {
 public:
  // `config` is the file's "normalizer" and may be null. Throws Error(invalid_argument), beginning with
  // `name`, for what is not supported.
  Normalizer(const nlohmann::json& config, std::string_view name);

  // `text` normalized: either `text` itself, or a view of `buffer`.
  [[nodiscard]] std::string_view apply(std::string_view text, Regex::Workspace& workspace,
                                       std::string& buffer) const;
  [[nodiscard]] bool is_nfc_or_nothing() const;

 private:
  struct Nfc {};
  struct Prepend {
    std::string prefix;
  };
  struct Replace {
    Pattern pattern;
    std::string content;
  };
  void add(const Component& component);

  std::vector<std::variant<Nfc, Prepend, Replace>> steps_;
};

}  // namespace krait::tokenizer
