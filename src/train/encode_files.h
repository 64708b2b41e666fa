// Text files to token ids, on all threads, in the order of the text and in bounded memory.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <vector>

#include "krait/core/context.h"
#include "krait/tokenizer/tokenizer.h"

namespace krait::dataset {

// The ids of some documents, or of a part of one.
struct EncodedRange {
  std::size_t file = 0;  // which of the paths
  std::vector<std::int64_t> ids;
  std::vector<std::size_t> document_ends;  // places in ids, rising; the text may go on in the next range
  bool ends_file = false;
};

struct EncodeFilesOptions {
  // Ends a document wherever it comes, and is appended to the documents of JSONL files.
  std::optional<std::int64_t> end_of_text;
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
};

// Calls `take` with range after range. Throws Error naming file and line.
void encode_files(const Context& ctx, const std::vector<std::filesystem::path>& paths,
                  const Tokenizer& tokenizer, const EncodeFilesOptions& options,
                  const std::function<void(const EncodedRange&)>& take);

}  // namespace krait::dataset
