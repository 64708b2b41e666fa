#include "krait/train/dataset.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "io/scratch.h"
#include "krait/core/error.h"
#include "krait/core/random.h"
#include "krait/io/npy.h"

namespace krait {
namespace {

using io::Scratch;
using Ids = std::vector<std::int64_t>;
using Paths = std::vector<std::filesystem::path>;

constexpr std::int64_t kNoLoss = TrainingBatch::kNoLoss;
const std::string kGolden = KRAIT_GOLDEN_DIR;
const std::string kShakespeare = KRAIT_SOURCE_DIR "/tests/data/tinyshakespeare.txt";

// <|endoftext|> is 0.
const Tokenizer& tokenizer() {
  static const Tokenizer loaded = Tokenizer::from_file(kGolden + "/tokenizer-train/mixed.json");
  return loaded;
}

std::unique_ptr<Dataset> open(const Paths& paths, const DatasetOptions& options, int threads = 2,
                              const Tokenizer* with = &tokenizer()) {
  Context ctx({.threads = threads});
  return Dataset::open(ctx, paths, with, options);
}

struct Row {
  Ids inputs;
  Ids targets;
  std::vector<std::int32_t> seq_idx;  // empty where absent
  friend bool operator==(const Row&, const Row&) = default;
};

std::vector<Row> rows_of(const Dataset& data, std::int64_t index) {
  TrainingBatch batch;
  data.fill(index, batch);
  std::vector<Row> rows;
  for (std::int64_t i = 0; i < data.batch_size(); ++i)
    rows.push_back({io::values_of<std::int64_t>(batch.inputs.select(0, i)),
                    io::values_of<std::int64_t>(batch.targets.select(0, i)),
                    batch.seq_idx ? io::values_of<std::int32_t>(batch.seq_idx.select(0, i))
                                  : std::vector<std::int32_t>()});
  return rows;
}

std::vector<Row> rows_of(const Dataset& data, std::int64_t begin, std::int64_t end) {
  std::vector<Row> rows;
  for (std::int64_t i = begin; i < end; ++i)
    for (Row& row : rows_of(data, i)) rows.push_back(std::move(row));
  return rows;
}

// A stream in which each token is its own place.
class Counting : public testing::Test {
 protected:
  [[nodiscard]] std::filesystem::path stream(std::int64_t tokens) const {
    Ids ids(static_cast<std::size_t>(tokens));
    std::iota(ids.begin(), ids.end(), 0);
    const auto path = scratch_ / ("stream" + std::to_string(tokens) + ".npy");
    io::write_npy(path, Tensor::from(ids));
    return path;
  }
  [[nodiscard]] std::unique_ptr<Dataset> count(std::int64_t tokens, DatasetOptions options) const {
    options.vocab_size = 1'000'000;
    return open({stream(tokens)}, options, 2, nullptr);
  }

  Scratch scratch_;
};

void expect_run(const Row& row, std::int64_t begin, std::int64_t length) {
  Ids expected(static_cast<std::size_t>(length) + 1);
  std::iota(expected.begin(), expected.end(), begin);
  EXPECT_EQ(row.inputs, Ids(expected.begin(), expected.end() - 1));
  EXPECT_EQ(row.targets, Ids(expected.begin() + 1, expected.end()));
  EXPECT_TRUE(row.seq_idx.empty());
}

TEST_F(Counting, AnEpochHasEachSequenceOnce) {
  const auto data = count(1003, {.seq_len = 10, .batch_size = 9, .seed = 3});
  // 1002 predictions are 99 sequences, 11 batches of 9, that begin at 0 to 12.
  ASSERT_EQ(data->batches_per_epoch(), 11);
  EXPECT_EQ(data->tokens(), 1003);
  std::set<std::int64_t> offsets;
  std::set<Ids> orders;
  for (std::int64_t epoch = 0; epoch < 40; ++epoch) {
    SCOPED_TRACE(epoch);
    Ids begins;
    for (const Row& row : rows_of(*data, 11 * epoch, 11 * (epoch + 1))) {
      expect_run(row, row.inputs[0], 10);
      begins.push_back(row.inputs[0]);
    }
    const std::int64_t offset = *std::min_element(begins.begin(), begins.end());
    for (std::int64_t& begin : begins) begin -= offset;
    orders.insert(begins);
    offsets.insert(offset);
    std::sort(begins.begin(), begins.end());
    for (std::int64_t i = 0; i < 99; ++i) EXPECT_EQ(begins[static_cast<std::size_t>(i)], 10 * i);
  }
  EXPECT_EQ(orders.size(), 40U);
  EXPECT_GE(offsets.size(), 10U);
  EXPECT_LE(*offsets.rbegin(), 12);
}

TEST_F(Counting, EpochsFollowWithoutGap) {
  const auto data = count(101, {.seq_len = 10, .batch_size = 4, .seed = 3});  // 9 sequences
  EXPECT_EQ(data->batches_per_epoch(), 3);
  const auto rows = rows_of(*data, 0, 9);
  for (std::size_t epoch = 0; epoch < 4; ++epoch) {
    std::set<std::int64_t> tens;
    for (std::size_t i = 0; i < 9; ++i) tens.insert(rows[9 * epoch + i].inputs[0] / 10);
    EXPECT_EQ(tens.size(), 9U) << "epoch " << epoch;
  }
}

TEST_F(Counting, ABatchIsAFunctionOfSeedAndIndex) {
  const DatasetOptions options{.seq_len = 7, .batch_size = 3, .seed = 11};
  const auto data = count(500, options);
  const auto again = count(500, options);
  const auto third = rows_of(*data, 3);
  (void)rows_of(*data, 100);
  EXPECT_EQ(rows_of(*data, 3), third);
  EXPECT_EQ(rows_of(*again, 3), third);
  EXPECT_NE(rows_of(*count(500, {.seq_len = 7, .batch_size = 3, .seed = 12}), 3), third);
  EXPECT_NE(rows_of(*data, 4), third);
}

// From one sequence on, whatever the remainder, nothing beyond the end is asked for, and over many epochs
// every token is a target.
TEST_F(Counting, EveryLengthWorks) {
  for (const bool carry : {false, true})
    for (const std::int64_t rows : {1, 3})
      for (std::int64_t tokens = (carry ? rows : 1) * 4 + 1; tokens < 26; ++tokens) {
        SCOPED_TRACE(testing::Message() << tokens << " tokens, " << rows << " rows, carry " << carry);
        const auto data = count(tokens, {.seq_len = 4, .batch_size = rows, .seed = 1, .carry = carry});
        std::set<std::int64_t> seen;
        for (const Row& row : rows_of(*data, 0, 150 * data->batches_per_epoch())) {
          expect_run(row, row.inputs[0], 4);
          seen.insert(row.targets.begin(), row.targets.end());
        }
        EXPECT_EQ(static_cast<std::int64_t>(seen.size()), tokens - 1);
      }
}

TEST_F(Counting, WithoutShuffleAllTokensComeInOrder) {
  for (const std::int64_t tokens : {2, 10, 11, 40, 41, 42, 50}) {
    SCOPED_TRACE(tokens);
    const auto data = count(tokens, {.seq_len = 10, .batch_size = 2, .shuffle = false});
    const auto rows = rows_of(*data, 0, data->batches_per_epoch());
    std::int64_t next = 0;
    for (const Row& row : rows) {
      for (std::size_t i = 0; i < 10; ++i, ++next) {
        EXPECT_EQ(row.inputs[i], next < tokens ? next : 0);
        EXPECT_EQ(row.targets[i], next + 1 < tokens ? next + 1 : kNoLoss);
      }
    }
    EXPECT_GE(next, tokens - 1);
    EXPECT_EQ(rows_of(*data, data->batches_per_epoch()), rows_of(*data, 0));
  }
}

TEST_F(Counting, CarriedRowsGoOn) {
  const auto data = count(1000, {.seq_len = 10, .batch_size = 4, .seed = 5, .carry = true});
  const std::int64_t batches = data->batches_per_epoch();
  EXPECT_EQ(batches, 24);  // 99 sequences at any offset, 24 in each row
  for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<Row> last;
    for (std::int64_t i = batches * epoch; i < batches * (epoch + 1); ++i) {
      const auto rows = rows_of(*data, i);
      for (std::size_t row = 0; row < 4; ++row) {
        EXPECT_EQ(data->restarts(i, static_cast<std::int64_t>(row)), last.empty());
        expect_run(rows[row], last.empty() ? rows[row].inputs[0] : last[row].targets.back(), 10);
      }
      last = rows;
    }
    EXPECT_EQ(last[0].inputs[0] + 10, rows_of(*data, batches * epoch)[1].inputs[0]);
  }
  EXPECT_TRUE(count(100, {.seq_len = 10, .batch_size = 2})->restarts(3, 1));
}

TEST_F(Counting, CarriedRowsWithoutShuffleHaveAllTokens) {
  const auto data =
      count(95, {.seq_len = 10, .batch_size = 3, .shuffle = false, .carry = true});  // 10 sequences, 4 a row
  std::set<std::int64_t> targets;
  for (const Row& row : rows_of(*data, 0, data->batches_per_epoch()))
    targets.insert(row.targets.begin(), row.targets.end());
  targets.erase(kNoLoss);
  EXPECT_EQ(targets.size(), 94U);
  EXPECT_TRUE(data->restarts(3, 2));  // an empty row
}

TEST_F(Counting, WritesIntoTensorsThatFit) {
  const auto data = count(100, {.seq_len = 10, .batch_size = 2});
  TrainingBatch batch;
  data->fill(0, batch);
  const void* memory = batch.inputs.raw();
  batch.seq_idx = Tensor::zeros({1});
  data->fill(1, batch);
  EXPECT_EQ(batch.inputs.raw(), memory);
  EXPECT_FALSE(batch.seq_idx);
}

// Documents and how they should come out, by a reader that does one thing after the other.
struct Naive {
  Ids ids;
  std::vector<std::int64_t> ends;

  void add(const Ids& document, bool end_of_text) {
    ids.insert(ids.end(), document.begin(), document.end());
    if (end_of_text) ids.push_back(0);
    ends.push_back(static_cast<std::int64_t>(ids.size()));
  }
  [[nodiscard]] std::int32_t document_of(std::int64_t place) const {
    return static_cast<std::int32_t>(std::upper_bound(ends.begin(), ends.end(), place) - ends.begin());
  }
  [[nodiscard]] Row row(std::int64_t begin, std::int64_t length, bool boundaries) const {
    Row row;
    for (std::int64_t at = begin; at < begin + length; ++at) {
      row.inputs.push_back(ids[static_cast<std::size_t>(at)]);
      const bool crosses = boundaries && document_of(at) != document_of(at + 1);
      row.targets.push_back(crosses ? kNoLoss : ids[static_cast<std::size_t>(at + 1)]);
      if (boundaries) row.seq_idx.push_back(document_of(at) - document_of(begin));
    }
    return row;
  }
};

class Documents : public testing::Test {
 protected:
  Documents() {
    Rng rng(2);
    std::string lines;
    for (int i = 0; i < 200; ++i) {
      std::string text;
      for (std::uint32_t words = 1 + rng.next_u32() % 12; words > 0; --words)
        text += i % 2 == 0 ? "ab " : "the ";
      lines += "{\"text\": \"" + text + "\", \"id\": " + std::to_string(i) + "}\n";
      naive_.add(tokenizer().encode(text), true);
    }
    jsonl_ = scratch_.put("lines.jsonl", lines);
    prose_ = scratch_.put("prose.txt", "one document without an end");
    naive_.add(tokenizer().encode("one document without an end"), false);
    marked_ = scratch_.put("marked.txt", "<|endoftext|>two<|endoftext|>\nthree<|endoftext|>");
    naive_.add({}, true);
    naive_.add(tokenizer().encode("two"), true);
    naive_.add(tokenizer().encode("\nthree"), true);
    paths_ = {jsonl_, prose_, marked_};
  }

  // Every row of some epochs, found again in the naive stream by its inputs.
  void expect_naive(const Dataset& data, bool boundaries) const {
    ASSERT_EQ(data.tokens(), static_cast<std::int64_t>(naive_.ids.size()));
    for (std::int64_t i = 0; i < 3 * data.batches_per_epoch(); ++i)
      for (const Row& row : rows_of(data, i)) {
        bool found = false;
        for (std::int64_t begin = 0; !found && begin + data.seq_len() < data.tokens(); ++begin)
          found = std::equal(row.inputs.begin(), row.inputs.end(), naive_.ids.begin() + begin) &&
                  naive_.row(begin, data.seq_len(), boundaries) == row;
        ASSERT_TRUE(found) << "batch " << i << ": " << testing::PrintToString(row.inputs) << " "
                           << testing::PrintToString(row.targets);
      }
  }

  Scratch scratch_;
  Naive naive_;
  std::filesystem::path jsonl_;
  std::filesystem::path prose_;
  std::filesystem::path marked_;
  Paths paths_;
};

TEST_F(Documents, StayApart) {
  for (const std::int64_t length : {1, 5, 40})
    expect_naive(*open(paths_, {.seq_len = length, .batch_size = 2, .vocab_size = 700}), true);
  expect_naive(*open(paths_, {.seq_len = 40, .batch_size = 2, .vocab_size = 70'000}), true);  // 32-bit ids
}

TEST_F(Documents, FlowTogetherWhereAsked) {
  const auto data =
      open(paths_, {.seq_len = 40, .batch_size = 2, .vocab_size = 700, .document_boundaries = false});
  expect_naive(*data, false);
}

TEST_F(Documents, InOrder) {
  const auto data = open(paths_, {.seq_len = 30, .batch_size = 2, .vocab_size = 700, .shuffle = false});
  std::int64_t begin = 0;
  for (const Row& row : rows_of(*data, 0, data->batches_per_epoch() - 1)) {
    EXPECT_EQ(row, naive_.row(begin, 30, true));
    begin += 30;
  }
}

TEST_F(Documents, RestartCarriedRows) {
  const auto data =
      open(paths_, {.seq_len = 3, .batch_size = 2, .vocab_size = 700, .shuffle = false, .carry = true});
  const std::int64_t batches = data->batches_per_epoch();
  int restarts = 0;
  for (std::int64_t i = 0; i < batches; ++i)
    for (std::int64_t row = 0; row < 2; ++row) {
      const std::int64_t begin = 3 * (row * batches + i);
      const bool starts = std::count(naive_.ends.begin(), naive_.ends.end(), begin) > 0;
      EXPECT_EQ(data->restarts(i, row), i == 0 || starts || begin >= data->tokens()) << i << " " << row;
      restarts += starts ? 1 : 0;
    }
  EXPECT_GT(restarts, 10);
}

TEST_F(Documents, EndWhereTheOptionsSay) {
  // "b" as the end of text: it ends documents of every kind of file and is appended to lines.
  const std::int64_t b = *tokenizer().token_to_id("b");
  const auto text = scratch_.put("b.txt", "xbxx");
  const auto line = scratch_.put("b.jsonl", R"({"text": "x"})");
  const auto npy = scratch_ / "b.npy";
  const std::int64_t x = *tokenizer().token_to_id("x");
  io::write_npy(npy, Tensor::from(Ids{x, b, x}));
  const auto data =
      open({text, line, npy}, {.seq_len = 8, .batch_size = 1, .vocab_size = 700, .end_of_text = b});
  const Row row = rows_of(*data, 0)[0];
  EXPECT_EQ(row.inputs, (Ids{x, b, x, x, x, b, x, b}));
  EXPECT_EQ(row.seq_idx, (std::vector<std::int32_t>{0, 0, 1, 1, 2, 2, 3, 3}));
  EXPECT_EQ(row.targets, (Ids{b, kNoLoss, x, kNoLoss, b, kNoLoss, b, kNoLoss}));
}

TEST(Dataset, DoesNotDependOnThreads) {
  const DatasetOptions options{.seq_len = 100, .batch_size = 4, .seed = 1, .vocab_size = 700};
  const auto one = open({kShakespeare, kGolden + "/tokenizer-train/mixed.jsonl"}, options, 1);
  const auto three = open({kShakespeare, kGolden + "/tokenizer-train/mixed.jsonl"}, options, 3);
  ASSERT_EQ(three->tokens(), one->tokens());
  for (std::int64_t i = 0; i < one->batches_per_epoch(); i += 7)
    ASSERT_EQ(rows_of(*three, i), rows_of(*one, i));
}

// Texts are encoded in parts where the tokenizer allows; the ids are those of the whole.
TEST(Dataset, EncodesAsAWhole) {
  const std::string text = io::content_of(kShakespeare);
  std::string json = io::content_of(kGolden + "/tokenizer-train/mixed.json");
  ASSERT_TRUE(tokenizer().may_cut_before_space());
  const std::string from = "\"use_regex\": true";
  json.replace(json.find(from), from.size(), "\"use_regex\": false");
  const Tokenizer whole = Tokenizer::from_json(json, "whole");
  ASSERT_FALSE(whole.may_cut_before_space());
  for (const Tokenizer* which : {&tokenizer(), &whole}) {
    const Ids ids = which->encode(text);
    const auto data = open({kShakespeare},
                           {.seq_len = 1000, .batch_size = 1, .vocab_size = 700, .shuffle = false}, 2, which);
    ASSERT_EQ(data->tokens(), static_cast<std::int64_t>(ids.size()));
    for (std::int64_t i = 0; i + 1 < data->batches_per_epoch(); ++i) {
      const Row row = rows_of(*data, i)[0];
      ASSERT_TRUE(std::equal(row.inputs.begin(), row.inputs.end(), ids.begin() + 1000 * i)) << i;
      ASSERT_TRUE(row.seq_idx.empty());  // one document
    }
  }
}

TEST(FixedBatches, ComeInOrderAndStartOver) {
  const std::string path = kGolden + "/train-mamba1-tiny/batches.npy";
  const Tensor file = io::read_npy(path).to(DType::i64);
  const auto data = open({path}, {.vocab_size = 1000}, 1, nullptr);
  EXPECT_EQ(data->seq_len(), 64);
  EXPECT_EQ(data->batch_size(), 4);
  EXPECT_EQ(data->batches_per_epoch(), 30);
  EXPECT_EQ(data->tokens(), 30 * 4 * 65);
  for (const std::int64_t i : {0, 17, 29, 30, 61}) {
    const auto rows = rows_of(*data, i);
    for (std::int64_t row = 0; row < 4; ++row) {
      const Ids ids = io::values_of<std::int64_t>(file.select(0, i % 30).select(0, row));
      EXPECT_EQ(rows[static_cast<std::size_t>(row)],
                (Row{Ids(ids.begin(), ids.end() - 1), Ids(ids.begin() + 1, ids.end()), {}}));
    }
  }
  EXPECT_TRUE(data->restarts(5, 0));
}

class Refusals : public testing::Test {
 protected:
  [[nodiscard]] std::filesystem::path npy(std::string_view name, const Tensor& tensor) const {
    io::write_npy(scratch_ / name, tensor);
    return scratch_ / name;
  }
  void expect(const Paths& paths, const DatasetOptions& options, std::string_view part,
              const Tokenizer* with = &tokenizer()) const {
    const std::string message = io::message_of([&] { return open(paths, options, 2, with); });
    EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_NE(message.find(paths.empty() ? "[dataset]" : paths.back().string()), std::string::npos)
        << message;
  }

  Scratch scratch_;
  DatasetOptions options_{.seq_len = 4, .batch_size = 2, .vocab_size = 700};
};

TEST_F(Refusals, Files) {
  expect({}, options_, "there are no files");
  expect({scratch_ / "nowhere.txt"}, options_, "cannot be opened");
  expect({scratch_ / "nowhere.npy"}, options_, "cannot be opened");
  expect({scratch_ / "nowhere.bin"}, options_, "cannot be opened");
  expect({scratch_.path()}, options_, "is a directory");
  expect({scratch_.put("empty.txt", "")}, options_, "is empty");
  expect({scratch_.put("empty.bin", "")}, options_, "does not begin as a packed token file");
  expect({scratch_.put("text.txt", "some text, long enough")}, options_, "needs a tokenizer", nullptr);
  expect({scratch_.put("bad.jsonl", "{}")}, options_, "line 1 has no text");
  expect({scratch_.put("short.txt", "ab")}, options_,
         "tokens, expected at least 5: one sequence of 4 and a target");
  expect({scratch_.put("blank.jsonl", "\n\n")}, options_, "has 0 tokens, expected at least 5");
  DatasetOptions carry = options_;
  carry.carry = true;
  expect({npy("eight.npy", Tensor::zeros({8}, DType::i64))}, carry,
         "has 8 tokens, expected at least 9: one sequence of 4 for each of 2 rows, and a target");
  DatasetOptions in_order = options_;
  in_order.shuffle = false;
  expect({npy("one.npy", Tensor::zeros({1}, DType::i64))}, in_order, "has 1 tokens, expected at least 2");
}

TEST_F(Refusals, Arrays) {
  expect({npy("f32.npy", Tensor::zeros({9}))}, options_, "array has dtype f32, expected integers");
  expect({npy("flat.npy", Tensor::zeros({3, 3}, DType::i64))}, options_,
         "array has shape (3, 3), expected (n,)");
  expect({npy("none.npy", Tensor::zeros({0}, DType::i64))}, options_, "array has shape (0,)");
  expect({npy("large.npy", Tensor::from(Ids{1, 700, 2, 3, 4, 5}))}, options_,
         "token id 700, expected ids from 0 to 699");
  expect({npy("minus.npy", Tensor::from(Ids{1, -1, 2, 3, 4, 5}))}, options_, "token id -1");
  const auto batches = npy("batches.npy", Tensor::zeros({3, 2, 5}, DType::i32));
  EXPECT_EQ(open({batches}, options_)->seq_len(), 4);
  DatasetOptions other = options_;
  other.seq_len = 5;
  expect({batches}, other, "expected rows of 6");
  other = options_;
  other.batch_size = 3;
  expect({batches}, other, "expected 3 rows in each batch");
  expect({scratch_.put("a.txt", "some text"), batches}, options_,
         "fixed batches, expected to be the only file");
  expect({npy("thin.npy", Tensor::zeros({3, 2, 1}, DType::i32))}, {.vocab_size = 7},
         "array has shape (3, 2, 1)");
  expect({npy("wide.npy", Tensor::from(Ids(10, 7), {1, 1, 10}))}, {.vocab_size = 7}, "token id 7");
}

TEST_F(Refusals, Options) {
  const auto text = scratch_.put("text.txt", "some text, long enough for a row or two of the batches here");
  expect({text}, {.seq_len = 4, .batch_size = 2, .vocab_size = 300}, "expected ids from 0 to 299");
  const auto message = [&](const DatasetOptions& options) {
    return io::message_of([&] { return open({text}, options); });
  };
  EXPECT_NE(message({.seq_len = 4, .batch_size = 2}).find("vocab_size is 0"), std::string::npos);
  EXPECT_NE(message({.batch_size = 2, .vocab_size = 700}).find("seq_len is 0"), std::string::npos);
  EXPECT_NE(message({.seq_len = -1, .batch_size = 2, .vocab_size = 700}).find("seq_len is -1"),
            std::string::npos);
}

TEST(EndOfText, IsFoundByNameOrPlace) {
  const auto special = [](std::int64_t id, const std::string& token) {
    return R"({"id": )" + std::to_string(id) + R"(, "content": ")" + token + R"(", "special": true})";
  };
  const auto end_with = [](const std::string& added) {
    return end_of_text(Tokenizer::from_json(
        R"({"added_tokens": [)" + added + R"(], "model": {"type": "BPE", "vocab": {"a": 1}, "merges": []}})",
        "made"));
  };
  EXPECT_EQ(end_with(special(0, "<unk>") + "," + special(2, "</s>")), 2);
  EXPECT_EQ(end_with(special(5, "<|endoftext|>")), 5);
  EXPECT_EQ(end_with(special(0, "<mine>")), 0);
  EXPECT_EQ(end_with(special(3, "<mine>")), std::nullopt);
  EXPECT_EQ(end_with(R"({"id": 0, "content": "</s>"})"), std::nullopt);
}

}  // namespace
}  // namespace krait
