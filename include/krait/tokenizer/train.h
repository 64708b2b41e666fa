// Learning a byte-level BPE vocabulary from text (Sennrich, Haddow and Birch, "Neural machine translation of
// rare words with subword units", ACL 2016; bytes as symbols: Radford et al., "Language models are
// unsupervised multitask learners", 2019).
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "krait/core/context.h"

namespace krait {

struct TokenizerTrainOptions {
  std::int64_t vocab_size = 0;  // special tokens and the 256 bytes included
  // Get the ids from 0 on, in this order. The first is what Krait's models end a text with.
  std::vector<std::string> special_tokens = {"<|endoftext|>"};
  std::int64_t min_frequency = 1;  // pairs that occur less often are not merged
  // Told now and then, on the calling thread: bytes of text that are counted, and of all texts.
  std::function<void(std::uint64_t done, std::uint64_t total)> progress;
};

struct TrainedTokenizer {
  std::string json;             // a tokenizer.json
  std::int64_t vocab_size = 0;  // smaller than asked for where the text has no more pairs to merge
};

// Reads text files and JSONL files (docs/training-data.md) and learns merges from them as Hugging Face's
// BpeTrainer does behind its ByteLevel pre-tokenizer, with the same result: the most frequent pair first,
// of equally frequent ones that with the smaller ids. The result depends on neither threads nor the order
// of files. Warns on the context where the vocabulary stays smaller than asked for. Throws Error, naming
// the file or option and what was expected, where texts cannot be read or are all empty, or where vocab_size
// is below 256 and the special tokens.
TrainedTokenizer train_tokenizer(Context& ctx, const std::vector<std::filesystem::path>& texts,
                                 const TokenizerTrainOptions& options);

}  // namespace krait
