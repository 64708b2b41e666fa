#include "krait/tokenizer/train.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <unordered_set>

#include "core/parallel.h"
#include "krait/core/error.h"
#include "tokenizer/bpe_trainer.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/gpt2_scanner.h"
#include "tokenizer/text_files.h"
#include "tokenizer/unicode.h"
#include "tokenizer/word_counts.h"

namespace krait {

using namespace tokenizer;

namespace {

constexpr std::int64_t kBytes = 256;

bool is_byte_character(std::string_view token) {
  const CodePoint c = code_point_at(token, 0);
  return c.length == token.size() && byte_of_character(c.value).has_value();
}

void check(const TokenizerTrainOptions& options) {
  std::unordered_set<std::string> seen;
  for (const std::string& token : options.special_tokens) {
    require(!token.empty(), "[tokenizer] a special token is empty, expected some text");
    require(is_valid_utf8(token), "[tokenizer] the special token ", in_quotes(token), " is not valid UTF-8");
    require(!is_byte_character(token), "[tokenizer] the special token ", in_quotes(token),
            " stands for a byte, expected a longer one");
    require(seen.insert(token).second, "[tokenizer] the special token ", in_quotes(token), " is there twice");
  }
  const auto least = kBytes + static_cast<std::int64_t>(options.special_tokens.size());
  require(options.vocab_size >= least, "[tokenizer] the vocabulary size is ", options.vocab_size,
          ", expected at least ", least, ": ", kBytes, " bytes and ", options.special_tokens.size(),
          " special tokens");
  require(options.vocab_size <= kMaxVocabulary, "[tokenizer] the vocabulary size is ", options.vocab_size,
          ", expected at most ", std::int64_t{kMaxVocabulary});
}

// Counts the pre-tokens of `text`.
void count_words(std::string_view text, WordCounts& counts) {
  std::string repaired;
  if (!is_valid_utf8(text)) {
    append_valid_utf8(repaired, text, true);
    text = repaired;
  }
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = gpt2_match_end(text, begin);
    counts.add(text.substr(begin, end - begin));
    begin = end;
  }
}

// Threads take ranges of the texts one by one and count each for itself: sums do not depend on who counted.
class WordCounter {
 public:
  WordCounter(const Context& ctx, const std::vector<std::filesystem::path>& texts,
              const std::function<void(std::uint64_t, std::uint64_t)>& progress)
      : ctx_(ctx), files_(texts, TextFiles::Cut::before_space), progress_(progress) {}

  WordCounts run() {
    std::vector<WordCounts> counts(static_cast<std::size_t>(ctx_.threads()));
    parallel_for(ctx_, ctx_.threads(), 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) work(counts[static_cast<std::size_t>(i)]);
    });
    if (error_) std::rethrow_exception(error_);
    for (std::size_t i = 1; i < counts.size(); ++i) {
      counts[0].add(counts[i]);
      counts[i] = {};
    }
    return std::move(counts[0]);
  }

 private:
  struct Turn {
    std::uint64_t number = 0;
    TextFiles::Range range;
  };

  std::optional<Turn> next() {
    const std::lock_guard lock(mutex_);
    if (error_) return std::nullopt;
    const auto range = files_.next();
    if (!range) return std::nullopt;
    return Turn{turns_++, *range};
  }

  void work(WordCounts& counts) {
    while (const auto turn = next()) {
      try {
        files_.for_each_text(turn->range, [&](std::string_view text, bool) { count_words(text, counts); });
        report(turn->range.bytes.size());
      } catch (...) {
        keep_first_error(turn->number);
      }
    }
  }

  void report(std::uint64_t bytes) {
    const std::uint64_t done = done_ += bytes;
    if (std::this_thread::get_id() != caller_) return;
    ctx_.check_cancelled();
    if (progress_) progress_(done, files_.total_bytes());
  }

  // Of several bad lines the first one is named, whichever thread was quicker.
  void keep_first_error(std::uint64_t turn) {
    const std::lock_guard lock(mutex_);
    if (error_ && error_turn_ < turn) return;
    error_ = std::current_exception();
    error_turn_ = turn;
  }

  const Context& ctx_;
  std::mutex mutex_;
  TextFiles files_;
  std::uint64_t turns_ = 0;
  std::exception_ptr error_;
  std::uint64_t error_turn_ = 0;
  std::atomic<std::uint64_t> done_{0};
  const std::function<void(std::uint64_t, std::uint64_t)>& progress_;
  std::thread::id caller_ = std::this_thread::get_id();
};

std::string json_text(std::string_view text) { return nlohmann::json(text).dump(); }

// As Hugging Face's library writes it. nlohmann::json would put the members of objects in another order.
std::string to_json(const BpeTrainer& trainer, const std::vector<std::string>& special_tokens) {
  std::string out = R"({
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [)";
  for (std::size_t id = 0; id < special_tokens.size(); ++id) {
    out += concat(id == 0 ? "" : ",", "\n    {\n      \"id\": ", id,
                  ",\n      \"content\": ", json_text(special_tokens[id]), R"(,
      "single_word": false,
      "lstrip": false,
      "rstrip": false,
      "normalized": false,
      "special": true
    })");
  }
  out += special_tokens.empty() ? "]" : "\n  ]";
  out += R"(,
  "normalizer": null,
  "pre_tokenizer": {
    "type": "ByteLevel",
    "add_prefix_space": false,
    "trim_offsets": true,
    "use_regex": true
  },
  "post_processor": null,
  "decoder": {
    "type": "ByteLevel",
    "add_prefix_space": true,
    "trim_offsets": true,
    "use_regex": true
  },
  "model": {
    "type": "BPE",
    "dropout": null,
    "unk_token": null,
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": false,
    "vocab": {)";
  const std::vector<std::string>& tokens = trainer.tokens();
  for (std::size_t id = 0; id < tokens.size(); ++id)
    out += concat(id == 0 ? "" : ",", "\n      ", json_text(tokens[id]), ": ", id);
  out += "\n    },\n    \"merges\": [";
  bool first = true;
  for (const auto& [left, right] : trainer.merges()) {
    out += concat(first ? "" : ",", "\n      [\n        ", json_text(tokens[left]), ",\n        ",
                  json_text(tokens[right]), "\n      ]");
    first = false;
  }
  out += first ? "]" : "\n    ]";
  return out + "\n  }\n}";
}

}  // namespace

TrainedTokenizer train_tokenizer(Context& ctx, const std::vector<std::filesystem::path>& texts,
                                 const TokenizerTrainOptions& options) {
  check(options);
  WordCounts words = WordCounter(ctx, texts, options.progress).run();
  require(words.size() > 0, "[tokenizer] the training text is empty, expected some text");
  BpeTrainer trainer(words, options.special_tokens);
  words = {};
  trainer.train(static_cast<std::size_t>(options.vocab_size), options.min_frequency);
  const auto size = static_cast<std::int64_t>(trainer.tokens().size());
  if (size < options.vocab_size)
    ctx.warn(concat("the training text has pairs for a vocabulary of ", size, ", fewer than the ",
                    options.vocab_size, " asked for"));
  return {.json = to_json(trainer, options.special_tokens), .vocab_size = size};
}

}  // namespace krait
