#include "train/checkpoint.h"

#include <gtest/gtest.h>

#include "io/scratch.h"

namespace krait {
namespace {

namespace fs = std::filesystem;

std::int64_t entries_of(const fs::path& path) {
  return std::distance(fs::directory_iterator(path), fs::directory_iterator());
}

Checkpoint checkpoint_of(std::int64_t step) {
  Checkpoint checkpoint;
  checkpoint.state = {.trainer = {.step = step,
                                  .updates = step - 1,
                                  .batches = 2 * step,
                                  .tokens = 100 * step,
                                  .skipped = 1,
                                  .skipped_in_a_row = 0,
                                  .seconds = 0.1 * static_cast<double>(step),
                                  .seed = 77,
                                  .data_tokens = 1234,
                                  .data_checksum = 0xFFFFFFFF},
                      .evaluated = step,
                      .sampled = -1,
                      .best_loss = 1.0 / 3.0,
                      .best_step = 5,
                      .evaluations_since_best = 2,
                      .finished = true};
  checkpoint.tensors.model.emplace("w", Tensor::from(std::vector<float>{1, 2, static_cast<float>(step)}));
  checkpoint.tensors.optimizer.emplace("m.w", Tensor::from(std::vector<float>{4, 5, 6}));
  return checkpoint;
}

const CheckpointTexts kTexts{.config_json = "{}", .tokenizer_json = "{\"a\": 1}"};

TEST(Checkpoint, ComesBackWhole) {
  const io::Scratch scratch;
  const CheckpointStore store(scratch / "checkpoints");
  EXPECT_FALSE(store.load_newest().has_value());
  EXPECT_FALSE(fs::exists(scratch / "checkpoints"));
  store.save(checkpoint_of(9), kTexts, 0);
  store.save(checkpoint_of(10), kTexts, 0);
  const auto back = store.load_newest();
  ASSERT_TRUE(back.has_value());
  const RunState expected = checkpoint_of(10).state;
  EXPECT_EQ(back->state.trainer.step, 10) << "10 comes after 9";
  EXPECT_EQ(back->state.trainer.updates, expected.trainer.updates);
  EXPECT_EQ(back->state.trainer.batches, expected.trainer.batches);
  EXPECT_EQ(back->state.trainer.tokens, expected.trainer.tokens);
  EXPECT_EQ(back->state.trainer.skipped, expected.trainer.skipped);
  EXPECT_EQ(back->state.trainer.seconds, expected.trainer.seconds);
  EXPECT_EQ(back->state.trainer.seed, expected.trainer.seed);
  EXPECT_EQ(back->state.trainer.data_tokens, expected.trainer.data_tokens);
  EXPECT_EQ(back->state.trainer.data_checksum, expected.trainer.data_checksum);
  EXPECT_EQ(back->state.evaluated, expected.evaluated);
  EXPECT_EQ(back->state.sampled, expected.sampled);
  EXPECT_EQ(back->state.best_loss, expected.best_loss);
  EXPECT_EQ(back->state.best_step, expected.best_step);
  EXPECT_EQ(back->state.evaluations_since_best, expected.evaluations_since_best);
  EXPECT_TRUE(back->state.finished);
  EXPECT_EQ(io::values_of<float>(back->tensors.model.at("w")), (std::vector<float>{1, 2, 10}));
  EXPECT_EQ(io::values_of<float>(back->tensors.optimizer.at("m.w")), (std::vector<float>{4, 5, 6}));
  EXPECT_EQ(io::content_of(store.path_of(10) / "tokenizer.json"), "{\"a\": 1}");
}

TEST(Checkpoint, TheNewestAreKept) {
  const io::Scratch scratch;
  const CheckpointStore store(scratch / "c");
  for (const std::int64_t step : {8, 9, 10, 11, 100}) store.save(checkpoint_of(step), kTexts, 3);
  EXPECT_EQ(store.steps(), (std::vector<std::int64_t>{10, 11, 100}));
  store.save(checkpoint_of(101), kTexts, 0);
  EXPECT_EQ(store.steps().size(), 4U);
  EXPECT_EQ(entries_of(scratch / "c"), 4) << "something else was left there";
}

TEST(Checkpoint, OneOfTheSameStepIsReplaced) {
  const io::Scratch scratch;
  const CheckpointStore store(scratch / "c");
  store.save(checkpoint_of(5), kTexts, 2);
  Checkpoint other = checkpoint_of(5);
  other.state.evaluated = 4;
  store.save(other, kTexts, 2);
  EXPECT_EQ(store.load_newest()->state.evaluated, 4);
  EXPECT_EQ(entries_of(scratch / "c"), 1);
}

TEST(Checkpoint, WhatAKilledProcessLeftIsNoCheckpoint) {
  const io::Scratch scratch;
  const fs::path path = scratch / "c";
  CheckpointStore(path).save(checkpoint_of(5), kTexts, 2);
  fs::create_directory(path / ".step-6.tmp");
  scratch.put("c/.step-6.tmp/model.safetensors", "half");
  fs::create_directory(path / ".step-4.old");
  const CheckpointStore store(path);
  EXPECT_EQ(store.load_newest()->state.trainer.step, 5);
  EXPECT_EQ(entries_of(path), 1);
  // Killed after the old one went and before the new one came.
  fs::rename(path / "step-5", path / ".step-5.replaced");
  EXPECT_EQ(CheckpointStore(path).load_newest()->state.trainer.step, 5);
  // Killed after the new one came and before the old one was removed.
  fs::create_directory(path / ".step-5.replaced");
  EXPECT_EQ(CheckpointStore(path).load_newest()->state.trainer.step, 5);
  EXPECT_EQ(entries_of(path), 1);
}

TEST(Checkpoint, DamageIsNamed) {
  const io::Scratch scratch;
  const CheckpointStore store(scratch / "c");
  store.save(checkpoint_of(5), kTexts, 2);
  const std::string state = io::content_of(store.path_of(5) / "state.json");
  scratch.put("c/step-5/state.json", "{}");
  EXPECT_MESSAGE(store.load_newest(), "step-5/state.json: is no state of a training run");
  std::string text = state;
  text.replace(text.find("\"updates\""), 9, "\"downdates\"");
  scratch.put("c/step-5/state.json", text);
  EXPECT_MESSAGE(store.load_newest(), "step-5/state.json: updates is missing");
  scratch.put("c/step-5/state.json", state);
  scratch.put("c/step-5/model.safetensors", "short");
  EXPECT_MESSAGE(store.load_newest(), "step-5/model.safetensors");
}

}  // namespace
}  // namespace krait
