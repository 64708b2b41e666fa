#include "krait/train/token_file.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "io/scratch.h"
#include "krait/core/error.h"
#include "krait/train/dataset.h"
#include "train/token_file.h"

namespace krait {
namespace {

using dataset::TokenFile;
using dataset::TokenFileWriter;
using io::Scratch;
using Ids = std::vector<std::int64_t>;

const std::string kGolden = KRAIT_GOLDEN_DIR;
const std::string kShakespeare = KRAIT_SOURCE_DIR "/tests/data/tinyshakespeare.txt";

const Tokenizer& tokenizer() {
  static const Tokenizer loaded = Tokenizer::from_file(kGolden + "/tokenizer-train/mixed.json");
  return loaded;
}

Ids ids_of(const TokenFile& file) {
  return std::visit([](const auto& ids) { return Ids(ids.begin(), ids.end()); }, file.part.ids);
}

std::filesystem::path write(const std::filesystem::path& path, std::int64_t vocab_size) {
  TokenFileWriter writer(path, vocab_size, 0);
  const std::vector<std::size_t> ends = {2, 3};
  writer.append(Ids{1, 2, 3, vocab_size - 1}, ends);
  writer.end_document();
  writer.end_document();
  writer.append(Ids{5}, {});
  writer.finish();
  return path;
}

// Parsed from memory of exactly that size.
TokenFile parse(const std::string& bytes) {
  const io::Memory memory(bytes);
  return dataset::parse_token_file(memory.bytes, memory.owner, "file");
}

TEST(TokenFile, HoldsIdsAndDocuments) {
  const Scratch scratch;
  for (const std::int64_t vocab_size : {700, 65'536, 65'537}) {
    SCOPED_TRACE(vocab_size);
    const TokenFile file = dataset::read_token_file(write(scratch / "a.bin", vocab_size));
    EXPECT_EQ(ids_of(file), (Ids{1, 2, 3, vocab_size - 1, 5}));
    EXPECT_EQ(std::vector<std::uint64_t>(file.part.document_ends.begin(), file.part.document_ends.end()),
              (std::vector<std::uint64_t>{2, 3, 4, 5}));
    EXPECT_EQ(file.vocab_size, vocab_size);
    EXPECT_EQ(file.end_of_text, 0);
    EXPECT_EQ(std::filesystem::file_size(scratch / "a.bin"),
              vocab_size > 65'536 ? 64 + 24 + 32 : 64 + 16 + 32);
  }
}

// No damage to header or index goes unnoticed, and none makes the reader leave the file.
TEST(TokenFile, NoticesDamage) {
  const Scratch scratch;
  const std::string whole = io::content_of(write(scratch / "a.bin", 700));
  for (std::size_t i = 0; i < whole.size(); ++i) {
    const bool in_ids = i >= 64 && i < 64 + 16;
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x10);
    if (in_ids) continue;
    EXPECT_MESSAGE(parse(damaged), "file: ") << "byte " << i;
  }
  for (std::size_t size = 0; size < whole.size(); ++size)
    EXPECT_MESSAGE(parse(whole.substr(0, size)), "file: ");
  EXPECT_MESSAGE(parse(whole + "x"), "does not fit 5 tokens and 4 documents");
  EXPECT_MESSAGE(parse("{\"text\": \"no such file\"}"), "does not begin as a packed token file does");
}

TEST(TokenFile, IdsAreCheckedWhereTheyAreRead) {
  const Scratch scratch;
  const auto path = write(scratch / "a.bin", 700);
  std::string bytes = io::content_of(path);
  bytes[64 + 2 * 2 + 1] = 0x7f;  // the third id
  scratch.put("a.bin", bytes);
  Context ctx({.threads = 1});
  const DatasetOptions options{.seq_len = 4, .batch_size = 1, .vocab_size = 700};
  const auto data = Dataset::open(ctx, {path}, nullptr, options);
  TrainingBatch batch;
  EXPECT_MESSAGE(data->fill(0, batch), path.string() + ": token 2 has the id 32515, expected ids below 700");
  EXPECT_MESSAGE(Dataset::open(ctx, {path}, nullptr, {.seq_len = 4, .batch_size = 1, .vocab_size = 699}),
                 "ids of a vocabulary of 700 tokens, expected at most 699");
}

TEST(Pack, GivesWhatTheTextsGive) {
  const Scratch scratch;
  const std::vector<std::filesystem::path> texts = {kShakespeare, kGolden + "/tokenizer-train/mixed.jsonl"};
  Context ctx({.threads = 3});
  std::uint64_t last = 0;
  std::uint64_t total = 0;
  const PackResult result = pack_token_file(ctx, texts, tokenizer(), scratch / "all.bin",
                                            {.progress = [&](std::uint64_t done, std::uint64_t of) {
                                              EXPECT_GT(done, last);
                                              last = done;
                                              total = of;
                                            }});
  EXPECT_EQ(last, total);
  EXPECT_EQ(result.bytes, total);
  EXPECT_EQ(result.documents, 61);
  const DatasetOptions options{.seq_len = 64, .batch_size = 3, .seed = 4, .vocab_size = 700};
  const auto packed = Dataset::open(ctx, {scratch / "all.bin"}, nullptr, options);
  const auto direct = Dataset::open(ctx, texts, &tokenizer(), options);
  ASSERT_EQ(packed->tokens(), direct->tokens());
  EXPECT_EQ(result.tokens, direct->tokens());
  TrainingBatch a;
  TrainingBatch b;
  for (std::int64_t i = 0; i < packed->batches_per_epoch(); i += 5) {
    packed->fill(i, a);
    direct->fill(i, b);
    ASSERT_EQ(io::values_of<std::int64_t>(a.inputs), io::values_of<std::int64_t>(b.inputs));
    ASSERT_EQ(io::values_of<std::int64_t>(a.targets), io::values_of<std::int64_t>(b.targets));
    ASSERT_EQ(io::values_of<std::int32_t>(a.seq_idx), io::values_of<std::int32_t>(b.seq_idx));
  }
  Context one({.threads = 1});
  (void)pack_token_file(one, texts, tokenizer(), scratch / "one.bin");
  EXPECT_TRUE(io::content_of(scratch / "one.bin") == io::content_of(scratch / "all.bin"));
}

TEST(Pack, LeavesTheOldFileWhereItFails) {
  const Scratch scratch;
  const auto out = scratch.put("out.bin", "old");
  const auto bad = scratch.put("bad.jsonl", "{\"text\": \"some\"}\n{\"txt\": 1}\n");
  const auto blank = scratch.put("blank.jsonl", "{\"text\": \"\"}\n");
  Context ctx({.threads = 2});
  EXPECT_MESSAGE(pack_token_file(ctx, {bad}, tokenizer(), out), bad.string() + ": line 2 has no text");
  EXPECT_MESSAGE(pack_token_file(ctx, {blank}, tokenizer(), out), "not written: the texts have no tokens");
  EXPECT_MESSAGE(pack_token_file(ctx, {kShakespeare}, tokenizer(), scratch / "no" / "out.bin"),
                 "cannot be created");
  Context stopped({.threads = 2, .cancelled = [] { return true; }});
  EXPECT_MESSAGE(pack_token_file(stopped, {kShakespeare}, tokenizer(), out), "");
  EXPECT_EQ(io::content_of(out), "old");
  EXPECT_EQ(scratch.count(), 3U);
}

}  // namespace
}  // namespace krait
