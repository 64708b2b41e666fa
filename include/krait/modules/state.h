// What a model remembers of a sequence, between prefill and steps: convolution windows, SSM states, keys
// and values of attention layers, and the position. One State per sequence; the states of one StatePool
// lie side by side, so that a batch of sequences is one operator call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "krait/core/memory.h"
#include "krait/core/tensor.h"

namespace krait {

// The state of one layer for one sequence. Absent parts have no dimensions.
struct LayerStateShape {
  Dims conv;             // (channels, d_conv - 1)
  Dims ssm;              // (d_inner, d_state) or (nheads, headdim, d_state)
  Dims kv;               // (2, num_heads_kv, head_dim): keys and values of one token
  Tensor ssm_initial{};  // the learnt initial state (init_states), or absent for zeros
};

class StatePool : public std::enable_shared_from_this<StatePool> {
 public:
  // All of a pool is f32, in `memory`, but SSM states, which may be kept as bf16 or f16: arithmetic stays
  // f32, and each step, and each pass of a prefill, rounds what it leaves to the nearest. `fingerprint` names
  // the model that the states belong to.
  static std::shared_ptr<StatePool> create(std::vector<LayerStateShape> layers, std::uint64_t fingerprint,
                                           std::int64_t capacity = 1, const Memory& memory = {},
                                           DType ssm_dtype = DType::f32);

  // Rows are handed out by State; a pool grows by doubling. Not while an operator runs on it.
  std::int64_t acquire();
  void release(std::int64_t row);
  void reset(std::int64_t row);
  void copy_row(std::int64_t from, std::int64_t to);

  [[nodiscard]] const Memory& memory() const { return memory_; }
  [[nodiscard]] int n_layer() const { return static_cast<int>(layers_.size()); }
  [[nodiscard]] std::uint64_t fingerprint() const { return fingerprint_; }
  [[nodiscard]] DType ssm_dtype() const { return ssm_dtype_; }
  // (rows, channels, d_conv - 1), channels contiguous.
  [[nodiscard]] const Tensor& conv(int layer) const { return layers_[index(layer)].conv; }
  // (rows, d_inner, d_state) or (rows, nheads, headdim, d_state), contiguous, of ssm_dtype().
  [[nodiscard]] const Tensor& ssm(int layer) const { return layers_[index(layer)].ssm; }
  // (length, 2, num_heads_kv, head_dim): the cache of one row, grown (by doubling) to hold `length` tokens.
  Tensor kv(int layer, std::int64_t row, std::int64_t length);

  // Changes when the pool has grown: where its states are.
  [[nodiscard]] const void* address() const;

  [[nodiscard]] std::int64_t position(std::int64_t row) const;
  void set_position(std::int64_t row, std::int64_t position);

  // Bytes of one sequence beside keys and values, and of keys and values for each token.
  [[nodiscard]] std::size_t fixed_bytes() const;
  [[nodiscard]] std::size_t bytes_per_token() const;

  // SSM states are saved in their dtype. An image of another dtype is converted, rounded to the nearest.
  void save_row(std::int64_t row, std::ostream& out) const;
  void load_row(std::int64_t row, std::istream& in, const std::string& name);

 private:
  struct Layer {
    LayerStateShape shape;
    Tensor conv;
    Tensor ssm;
    std::vector<Tensor> kv;  // one for each row, absent while empty
  };
  StatePool() = default;
  [[nodiscard]] std::size_t index(int layer) const { return static_cast<std::size_t>(layer); }
  void reserve(std::int64_t capacity);

  Memory memory_;
  DType ssm_dtype_ = DType::f32;
  std::vector<Layer> layers_;
  std::vector<std::int64_t> positions_;
  std::vector<std::int64_t> free_;
  std::vector<bool> untouched_;  // rows that are as reserve left them, which is as reset does
  std::int64_t capacity_ = 0;
  std::uint64_t fingerprint_ = 0;
};

// A sequence's row of a pool. Moving is cheap; copies are explicit (fork).
class State {
 public:
  explicit State(std::shared_ptr<StatePool> pool);
  ~State();
  State(State&& other) noexcept;
  State& operator=(State&& other) noexcept;
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  // Tokens that the state has seen.
  [[nodiscard]] std::int64_t position() const { return pool_->position(row_); }
  // A second sequence that goes on from here.
  [[nodiscard]] State fork() const;
  // Back to the state of `earlier`, a fork made at some point of this or another sequence of the same pool.
  void rollback(const State& earlier);
  // Back to the empty sequence.
  void reset();

  // A versioned, checksummed image: "KRAITST2", fingerprint, position, dtype, tensors, CRC-32. load throws
  // where the image is damaged, truncated, or belongs to another model, and leaves the state as it was.
  void save(std::ostream& out) const;
  void load(std::istream& in, const std::string& name = "state");
  // Bytes in use by this sequence.
  [[nodiscard]] std::size_t nbytes() const;

  [[nodiscard]] const std::shared_ptr<StatePool>& pool() const { return pool_; }
  [[nodiscard]] std::int64_t row() const { return row_; }

 private:
  std::shared_ptr<StatePool> pool_;
  std::int64_t row_ = -1;
};

}  // namespace krait
