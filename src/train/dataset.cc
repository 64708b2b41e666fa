#include "krait/train/dataset.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "krait/core/error.h"
#include "krait/io/npy.h"
#include "train/encode_files.h"
#include "train/fixed_batches.h"
#include "train/stream_dataset.h"
#include "train/token_file.h"

namespace krait {

using namespace dataset;

namespace {

namespace fs = std::filesystem;

// Ids are widened in blocks of this size.
constexpr std::int64_t kBlock = std::int64_t{1} << 16;

bool is_packed(const fs::path& path) { return path.extension() == ".bin"; }
bool is_npy(const fs::path& path) { return path.extension() == ".npy"; }
bool is_text(const fs::path& path) { return !is_packed(path) && !is_npy(path); }

std::string name_of_all(const std::vector<fs::path>& paths) {
  const std::string first = paths.front().string();
  return paths.size() == 1 ? first : concat(first, " and ", paths.size() - 1, " more");
}

Tensor read_npy_ids(const fs::path& path) {
  Tensor ids = io::read_npy(path);
  require(ids.ndim() == 1 || ids.ndim() == 3, path.string(), ": array has shape ", ids.shape(),
          ", expected (n,), a stream of token ids, or (steps, batch, length + 1), fixed batches");
  const bool is_integer = ids.dtype() == DType::u8 || ids.dtype() == DType::i8 || ids.dtype() == DType::i16 ||
                          ids.dtype() == DType::i32 || ids.dtype() == DType::i64;
  require(is_integer, path.string(), ": array has dtype ", ids.dtype(), ", expected integers: token ids");
  require(ids.numel() > 0, path.string(), ": array has shape ", ids.shape(), ", expected token ids in it");
  return ids;
}

// Puts the files, one after the other, into one stream.
class StreamReader {
 public:
  StreamReader(const Context& ctx, const Tokenizer* tokenizer, const DatasetOptions& options)
      : ctx_(ctx), tokenizer_(tokenizer), options_(options), stream_(options.vocab_size) {
    end_of_text_ = options.end_of_text;
    if (!end_of_text_ && tokenizer != nullptr) end_of_text_ = end_of_text(*tokenizer);
  }

  // Neighbouring texts are encoded together, so that small ones keep all threads busy.
  TokenStream read(const std::vector<fs::path>& paths) {
    for (auto path = paths.begin(); path != paths.end();) {
      const auto texts_end = std::find_if_not(path, paths.end(), is_text);
      if (texts_end != path) {
        add_texts({path, texts_end});
        path = texts_end;
      } else if (is_npy(*path)) {
        add_npy(*path++);
      } else {
        add_packed(*path++);
      }
    }
    return std::move(stream_);
  }

 private:
  void add_texts(const std::vector<fs::path>& paths) {
    if (tokenizer_ == nullptr)
      fail(ErrorKind::invalid_argument, paths.front().string(),
           ": is a text, which needs a tokenizer; expected a packed token file (.bin) or token ids (.npy)");
    PartBuilder part(paths.front().string(), options_.vocab_size);
    encode_files(ctx_, paths, *tokenizer_, {.end_of_text = end_of_text_, .progress = {}},
                 [&](const EncodedRange& range) {
                   part.append(range.ids, range.document_ends);
                   if (!range.ends_file) return;
                   stream_.add(part.take());
                   if (range.file + 1 < paths.size())
                     part = PartBuilder(paths[range.file + 1].string(), options_.vocab_size);
                 });
  }

  void add_packed(const fs::path& path) {
    TokenFile file = read_token_file(path);
    require(file.vocab_size <= options_.vocab_size, path.string(), ": has ids of a vocabulary of ",
            file.vocab_size, " tokens, expected at most ", options_.vocab_size);
    stream_.add(std::move(file.part));
  }

  void add_npy(const fs::path& path) {
    const Tensor ids = read_npy_ids(path);
    require(ids.ndim() == 1, path.string(), ": array has shape ", ids.shape(),
            ": fixed batches, expected to be the only file");
    PartBuilder part(path.string(), options_.vocab_size);
    std::vector<std::size_t> ends;
    for (std::int64_t begin = 0; begin < ids.numel(); begin += kBlock) {
      const Tensor block =
          ids.slice(0, begin, std::min(ids.numel(), begin + kBlock)).to(DType::i64).contiguous();
      const auto values = block.span<std::int64_t>();
      ends.clear();
      for (std::size_t i = 0; i < values.size(); ++i)
        if (values[i] == end_of_text_) ends.push_back(i + 1);
      part.append(values, ends);
    }
    stream_.add(part.take());
  }

  const Context& ctx_;
  const Tokenizer* tokenizer_;
  const DatasetOptions& options_;
  std::optional<std::int64_t> end_of_text_;
  TokenStream stream_;
};

}  // namespace

std::optional<std::int64_t> end_of_text(const Tokenizer& tokenizer) {
  constexpr std::array<std::string_view, 4> kNames = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"};
  for (const std::string_view name : kNames)
    if (const auto id = tokenizer.token_to_id(name); id && tokenizer.is_special(*id)) return id;
  return tokenizer.is_special(0) ? std::optional<std::int64_t>(0) : std::nullopt;
}

std::unique_ptr<Dataset> Dataset::open(Context& ctx, const std::vector<fs::path>& paths,
                                       const Tokenizer* tokenizer, const DatasetOptions& options) {
  require(!paths.empty(), "[dataset] there are no files, expected one at least");
  require(options.vocab_size > 0 && options.vocab_size <= std::int64_t{1} << 32, "[dataset] vocab_size is ",
          options.vocab_size, ", expected 1 to 2^32");
  require(options.seq_len >= 0 && options.batch_size >= 0, "[dataset] seq_len is ", options.seq_len,
          " and batch_size ", options.batch_size, ", expected none below 0");
  if (paths.size() == 1 && is_npy(paths[0])) {
    const Tensor ids = read_npy_ids(paths[0]);
    if (ids.ndim() == 3) return fixed_batches(ids, paths[0].string(), options);
  }
  require(options.seq_len > 0 && options.batch_size > 0, "[dataset] seq_len is ", options.seq_len,
          " and batch_size ", options.batch_size,
          ", expected 1 at least: only fixed batches say it themselves");
  (void)numel_of({options.batch_size, options.seq_len});  // throws where a batch is too large to be counted
  return stream_dataset(StreamReader(ctx, tokenizer, options).read(paths), options, name_of_all(paths));
}

}  // namespace krait
