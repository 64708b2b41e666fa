// Files that are part of the library: one binary runs anywhere.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace krait::bundled {

std::string_view shakespeare_config();
std::string_view shakespeare_tokenizer();
std::span<const std::byte> shakespeare_weights();
std::string_view gpt_neox_tokenizer();

}  // namespace krait::bundled
