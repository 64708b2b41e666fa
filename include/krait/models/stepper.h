// Stepper: decoding step by step. On a GPU a step is some two hundred kernels of a few microseconds each, so
// that launching them one by one takes longer than running them: the Stepper records a step as a graph at its
// second use and launches the whole of it from then on; where the context profiles kernels, it does not.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "krait/models/language_model.h"

namespace krait {

// Batches of that many sequences share one recording, with padding slots in the places left over, so that a
// batch may lose and gain sequences between steps: n itself up to 4, 8, the next multiple of 16 up to 128, of
// 64 beyond.
[[nodiscard]] std::int64_t recorded_size(std::int64_t n);

class Stepper {
 public:
  // The model, its weights and the context must outlive the stepper and stay where they are.
  Stepper(Context& ctx, const LanguageModel& model) : ctx_(ctx), model_(model) {}

  // Sequence i takes the token ids[i] on top of states[i], all of one pool. Returns logits (n, V) in f32 on
  // the context's device, which the next call overwrites. Throws as LanguageModel::logits does.
  const Tensor& step(std::span<const std::int64_t> ids, std::span<State* const> states);

  // Whether tokens need not be known on the host: then the same with ids (n) i64 on the context's device,
  // which are not checked: one outside the vocabulary counts as zeros.
  [[nodiscard]] bool steps_ahead() const;
  const Tensor& step(const Tensor& ids, std::span<State* const> states);

 private:
  // Of steps of up to n sequences, n a recorded_size.
  struct Recorded {
    Tensor ids;                            // (n) i64 on the device
    Tensor rows;                           // (n) i64 on the device: of the pool; -1: a padding slot
    std::vector<std::int64_t> known_rows;  // what `rows` holds
    Tensor logits;                         // (n, V), the first rows of the largest there are
    const void* pool_memory = nullptr;     // where the states were when the graph was recorded
    std::function<void()> launch;          // absent before the second step
  };
  const Tensor& launch(const Tensor& ids, std::span<State* const> states);
  void run(const Recorded& recorded, const std::shared_ptr<StatePool>& pool);

  Context& ctx_;
  const LanguageModel& model_;
  std::map<std::int64_t, Recorded> recorded_;
  Tensor largest_;  // logits that recordings share
  Tensor logits_;   // of the last step
};

}  // namespace krait
