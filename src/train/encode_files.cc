#include "train/encode_files.h"

#include <algorithm>
#include <exception>

#include "core/parallel.h"
#include "tokenizer/text_files.h"

namespace krait::dataset {
namespace {

using tokenizer::TextFiles;

// So many ranges for each thread are read, then encoded in parallel, then handed on in order: enough that
// threads seldom wait for the last one.
constexpr std::size_t kRangesPerThread = 16;

EncodedRange encode(const TextFiles& files, const TextFiles::Range& range, bool is_jsonl,
                    const Tokenizer& tokenizer, std::optional<std::int64_t> end_of_text) {
  EncodedRange out{.file = range.file, .ends_file = range.ends_file};
  const auto end_document = [&] {
    if (out.document_ends.empty() || out.document_ends.back() < out.ids.size())
      out.document_ends.push_back(out.ids.size());
  };
  files.for_each_text(range, [&](std::string_view text, bool ends_document) {
    for (const std::int64_t id : tokenizer.encode(text)) {
      out.ids.push_back(id);
      if (id == end_of_text) end_document();
    }
    if (!ends_document) return;
    const bool has_end = !out.ids.empty() && out.ids.back() == end_of_text;
    if (is_jsonl && end_of_text && !has_end) out.ids.push_back(*end_of_text);
    end_document();
  });
  return out;
}

}  // namespace

void encode_files(const Context& ctx, const std::vector<std::filesystem::path>& paths,
                  const Tokenizer& tokenizer, const EncodeFilesOptions& options,
                  const std::function<void(const EncodedRange&)>& take) {
  TextFiles files(paths,
                  tokenizer.may_cut_before_space() ? TextFiles::Cut::before_space : TextFiles::Cut::never);
  const std::size_t most = kRangesPerThread * static_cast<std::size_t>(ctx.threads());
  std::vector<TextFiles::Range> ranges;
  std::vector<EncodedRange> encoded;
  std::vector<std::exception_ptr> errors;
  std::uint64_t done = 0;
  while (true) {
    ranges.clear();
    while (ranges.size() < most) {
      const auto range = files.next();
      if (!range) break;
      ranges.push_back(*range);
    }
    if (ranges.empty()) return;
    ctx.check_cancelled();
    encoded.assign(ranges.size(), {});
    errors.assign(ranges.size(), nullptr);
    parallel_for_dynamic(ctx, static_cast<std::int64_t>(ranges.size()), [&](std::int64_t index) {
      const auto i = static_cast<std::size_t>(index);
      try {
        encoded[i] = encode(files, ranges[i], TextFiles::is_jsonl(paths[ranges[i].file]), tokenizer,
                            options.end_of_text);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
    for (std::size_t i = 0; i < ranges.size(); ++i) {
      if (errors[i]) std::rethrow_exception(errors[i]);
      take(encoded[i]);
      done += ranges[i].bytes.size();
    }
    if (options.progress) options.progress(done, files.total_bytes());
  }
}

}  // namespace krait::dataset
