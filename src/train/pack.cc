#include "krait/core/error.h"
#include "krait/train/dataset.h"
#include "krait/train/token_file.h"
#include "train/encode_files.h"
#include "train/token_file.h"

namespace krait {

PackResult pack_token_file(Context& ctx, const std::vector<std::filesystem::path>& texts,
                           const Tokenizer& tokenizer, const std::filesystem::path& out,
                           const PackOptions& options) {
  const auto end = options.end_of_text ? options.end_of_text : end_of_text(tokenizer);
  dataset::TokenFileWriter writer(out, tokenizer.vocab_size(), end);
  PackResult result;
  const dataset::EncodeFilesOptions encoding{.end_of_text = end,
                                             .progress = [&](std::uint64_t done, std::uint64_t total) {
                                               result.bytes = done;
                                               if (options.progress) options.progress(done, total);
                                             }};
  dataset::encode_files(ctx, texts, tokenizer, encoding, [&](const dataset::EncodedRange& range) {
    writer.append(range.ids, range.document_ends);
    if (range.ends_file) writer.end_document();
  });
  require(writer.tokens() > 0, out.string(), ": not written: the texts have no tokens");
  writer.finish();
  result.tokens = writer.tokens();
  result.documents = writer.documents();
  return result;
}

}  // namespace krait
