// A small model and a text of made-up tokens to train it on, in a second.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "krait/core/random.h"
#include "krait/models/language_model.h"
#include "krait/train/dataset.h"

namespace krait {

inline constexpr std::int64_t kTinyVocab = 48;

inline ModelConfig tiny_config(bool tied = true) {
  return parse_config(R"({"d_model": 32, "n_layer": 2, "vocab_size": 48, "rms_norm": true,
                          "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 16},
                          "pad_vocab_size_multiple": 8, "tie_embeddings": )" +
                          std::string(tied ? "true" : "false") + "}",
                      "tiny");
}

inline LanguageModel tiny_model(bool tied = true) {
  LanguageModel model(tiny_config(tied));
  model.initialize(3);
  return model;
}

// Batches of rows that count up from a random token in random strides: to be learnt in some steps.
class CountingData : public Dataset {
 public:
  CountingData(std::int64_t rows, std::int64_t length) : rows_(rows), length_(length) {}

  // Puts `token` into the first row of a batch.
  void plant(std::int64_t batch, std::int64_t token) { planted_[batch] = token; }
  // Row r has no targets in its last r tokens.
  void set_ragged() { ragged_ = true; }

  [[nodiscard]] std::int64_t seq_len() const override { return length_; }
  [[nodiscard]] std::int64_t batch_size() const override { return rows_; }
  [[nodiscard]] std::int64_t tokens() const override { return 100 * rows_ * length_; }
  [[nodiscard]] std::int64_t batches_per_epoch() const override { return 100; }
  [[nodiscard]] bool restarts(std::int64_t batch, std::int64_t row) const override {
    return (batch + row) % 4 == 0;
  }
  void fill(std::int64_t index, TrainingBatch& batch) const override {
    batch.inputs = Tensor::empty({rows_, length_}, DType::i64);
    batch.targets = Tensor::empty({rows_, length_}, DType::i64);
    for (std::int64_t r = 0; r < rows_; ++r) {
      // A row is a function of its place among all rows, whatever their number in a batch.
      const std::int64_t place = index * rows_ + r;
      Rng rng(5, static_cast<std::uint64_t>(place));
      const std::int64_t first = rng.next_u32() % (kTinyVocab - 1);
      const std::int64_t stride = 1 + rng.next_u32() % 2;
      for (std::int64_t t = 0; t < length_; ++t) {
        const std::int64_t at = r * length_ + t;
        const auto token = [&](std::int64_t i) { return (first + stride * i) % (kTinyVocab - 1); };
        batch.inputs.data<std::int64_t>()[at] = token(t);
        const bool silent = ragged_ && t >= length_ - place % 4;
        batch.targets.data<std::int64_t>()[at] = silent ? TrainingBatch::kNoLoss : token(t + 1);
      }
    }
    if (const auto found = planted_.find(index); found != planted_.end())
      batch.inputs.data<std::int64_t>()[length_ / 2] = found->second;
  }

 private:
  std::int64_t rows_;
  std::int64_t length_;
  bool ragged_ = false;
  std::map<std::int64_t, std::int64_t> planted_;
};

}  // namespace krait
