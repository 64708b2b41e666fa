// Templates of evaluation tasks: texts with {{expressions}} over the fields of a document, the part of Jinja
// that tasks of lm-evaluation-harness use most. docs/evaluation.md lists what is understood.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace krait {

// A template that is one expression gives its value, any other a text. Throws Error(invalid_argument) where
// the template or a value is not understood, and where the document has no such field.
nlohmann::json evaluate_template(std::string_view text, const nlohmann::json& document);

// A text as it is, an integer in digits. Throws for other values.
std::string text_of(const nlohmann::json& value);

}  // namespace krait
