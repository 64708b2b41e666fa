// Packed token files (.bin): token ids of many documents, mapped and read in place, made once by
// `krait data pack`. docs/training-data.md describes the bytes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <vector>

#include "krait/core/context.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait {

struct PackOptions {
  std::optional<std::int64_t> end_of_text;  // absent: the tokenizer's (see end_of_text in dataset.h)
  // Told now and then, on the calling thread: bytes of text that are done, and of all texts.
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
};

struct PackResult {
  std::int64_t tokens = 0;
  std::int64_t documents = 0;
  std::uint64_t bytes = 0;  // of the texts
};

// Encodes text files and JSONL files, on all threads, into the packed file `out`, which appears complete or
// not at all. Holds some megabytes for each thread, whatever the size of the texts, and eight bytes for each
// document. Throws Error naming the file (and line) and what was expected.
PackResult pack_token_file(Context& ctx, const std::vector<std::filesystem::path>& texts,
                           const Tokenizer& tokenizer, const std::filesystem::path& out,
                           const PackOptions& options = {});

}  // namespace krait
