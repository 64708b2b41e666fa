// What Split and Replace look for: a literal string or a regular expression.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "tokenizer/component.h"
#include "tokenizer/regex.h"

namespace krait::tokenizer {

class Pattern {
 public:
  // From a component's field "pattern": {"String": "..."} or {"Regex": "..."}.
  explicit Pattern(const Component& component) {
    const nlohmann::json& pattern = component.field("pattern");
    const auto holds = [&](const char* kind) {
      return pattern.is_object() && pattern.size() == 1 && pattern.contains(kind) &&
             pattern.at(kind).is_string();
    };
    if (holds("String")) {
      what_ = pattern.at("String").get<std::string>();
    } else if (holds("Regex")) {
      what_ = Regex(pattern.at("Regex").get<std::string>(), component.where());
    } else {
      component.refuse("pattern", R"({"String": "..."} or {"Regex": "..."})");
    }
  }

  // Appends the matches in `text`, left to right. An empty literal matches nothing.
  void find_all(std::string_view text, Regex::Workspace& workspace, std::vector<Range>& matches) const {
    if (const auto* regex = std::get_if<Regex>(&what_)) {
      regex->find_all(text, workspace, matches);
      return;
    }
    const std::string& literal = std::get<std::string>(what_);
    if (literal.empty()) return;
    for (auto at = text.find(literal); at != std::string_view::npos;
         at = text.find(literal, at + literal.size())) {
      matches.push_back({at, at + literal.size()});
    }
  }

  // `text` with every match replaced by `content`.
  [[nodiscard]] std::string replace_all(std::string_view text, std::string_view content,
                                        Regex::Workspace& workspace) const {
    std::vector<Range> matches;
    find_all(text, workspace, matches);
    std::string out;
    out.reserve(text.size());
    std::size_t copied = 0;
    for (const Range& match : matches) {
      out.append(text.substr(copied, match.begin - copied)).append(content);
      copied = match.end;
    }
    out.append(text.substr(copied));
    return out;
  }

 private:
  std::variant<std::string, Regex> what_;
};

}  // namespace krait::tokenizer
