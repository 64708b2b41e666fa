#include "tokenizer/normalizer.h"

#include <algorithm>
#include <utility>

#include "krait/core/error.h"

namespace krait::tokenizer {

Normalizer::Normalizer(const nlohmann::json& config, std::string_view name) {
  if (!config.is_null()) add(Component(config, concat(name, ": normalizer")));
}

void Normalizer::add(const Component& component) {
  if (component.type() == "NFC") {
    steps_.emplace_back(Nfc{});
  } else if (component.type() == "Prepend") {
    steps_.emplace_back(Prepend{component.text("prepend")});
  } else if (component.type() == "Replace") {
    steps_.emplace_back(Replace{Pattern(component), component.text("content")});
  } else if (component.type() == "Sequence") {
    for (const Component& part : component.parts("normalizers")) add(part);
  } else {
    component.refuse_type("NFC, Prepend, Replace or Sequence");
  }
}

bool Normalizer::is_nfc_or_nothing() const {
  return std::all_of(steps_.begin(), steps_.end(),
                     [](const auto& step) { return std::holds_alternative<Nfc>(step); });
}

std::string_view Normalizer::apply(std::string_view text, Regex::Workspace& workspace,
                                   std::string& buffer) const {
  const auto keep = [&](std::string changed) {
    buffer = std::move(changed);
    text = buffer;
  };
  for (const auto& step : steps_) {
    if (std::holds_alternative<Nfc>(step)) {
      if (ascii_prefix(text) < text.size()) keep(to_nfc(text));
    } else if (const auto* prepend = std::get_if<Prepend>(&step)) {
      if (!text.empty()) keep(concat(prepend->prefix, text));
    } else {
      const auto& replace = std::get<Replace>(step);
      keep(replace.pattern.replace_all(text, replace.content, workspace));
    }
  }
  return text;
}

}  // namespace krait::tokenizer
