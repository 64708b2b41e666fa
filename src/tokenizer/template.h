// What TemplateProcessing adds around a text, such as "<s>" in front.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string_view>
#include <vector>

#include "tokenizer/component.h"

namespace krait::tokenizer {

struct Template {
  std::vector<std::int64_t> before;
  std::vector<std::int64_t> after;
};

// `config` is the file's "post_processor" and may be null. ByteLevel adds nothing. Throws
// Error(invalid_argument), beginning with `name`, for what is not supported: other types, a second
// template, and a template of a single text that does not contain $A once.
[[nodiscard]] Template read_template(const nlohmann::json& config, std::string_view name);

}  // namespace krait::tokenizer
