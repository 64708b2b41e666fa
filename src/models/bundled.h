// Files that are part of the library: one binary runs anywhere.
#pragma once

#include <cstddef>
#include <span>

namespace krait::bundled {

std::span<const std::byte> shakespeare_config();
std::span<const std::byte> shakespeare_tokenizer();
std::span<const std::byte> shakespeare_weights();
std::span<const std::byte> gpt_neox_tokenizer();

}  // namespace krait::bundled
