// The byte alphabet of byte-level BPE (Radford et al., "Language models are unsupervised multitask
// learners", 2019): every byte is written as one printable character, so that a vocabulary of any bytes
// is text. Printable Latin-1 bytes stand for themselves; the other 68 are U+0100 onwards, in order.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace krait::tokenizer {

[[nodiscard]] char32_t character_of_byte(unsigned char byte);
// Nothing for a character outside the alphabet.
[[nodiscard]] std::optional<unsigned char> byte_of_character(char32_t c);

// Appends the characters of `bytes`.
void append_byte_characters(std::string& out, std::string_view bytes);
// Appends the bytes that `token` stands for; a token with any character outside the alphabet stands
// for itself.
void append_bytes_of(std::string& out, std::string_view token);

}  // namespace krait::tokenizer
