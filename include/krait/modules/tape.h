// Tape: what the forward of a training step keeps for its backward. The caller owns it; each module keeps
// tensors by name in a frame of its own, so that what a step holds can be counted and printed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "krait/core/context.h"
#include "krait/core/tensor.h"

namespace krait {

enum class Recompute : std::uint8_t {
  none,   // every module keeps what its backward reads
  block,  // only the input of each block is kept; its forward runs again in front of its backward
};

struct TapeOptions {
  Recompute recompute = Recompute::none;
  double dropout = 0.0;  // in [0, 1): of the embedding and of what each residual branch adds
  std::uint64_t seed = 0;
};

class Tape {
 public:
  explicit Tape(const TapeOptions& options = {});

  // The tensors that one module keeps between its forward and its backward.
  class Frame {
   public:
    void keep(std::string_view name, const Tensor& tensor);
    [[nodiscard]] bool has(std::string_view name) const;
    // Throws where nothing of that name was kept: backward without forward.
    [[nodiscard]] const Tensor& operator[](std::string_view name) const;

   private:
    friend class Tape;
    std::map<std::string, Tensor, std::less<>> tensors_;
  };

  // Drops everything and starts a forward. `pass` numbers it within a run: dropout masks depend on seed,
  // pass and place alone.
  void begin(std::uint64_t pass = 0);
  [[nodiscard]] Frame& frame(int layer, std::string_view module);
  // Drops what `layer` kept; its backward is done.
  void drop(int layer);
  // Drops the frame of one module.
  void drop(int layer, std::string_view module);

  [[nodiscard]] const TapeOptions& options() const { return options_; }
  // A block runs its forward again: states are as the first run found them and are not advanced.
  [[nodiscard]] bool recomputing() const { return recomputing_; }
  void set_recomputing(bool on) { recomputing_ = on; }

  // x with dropout, in place, where the options ask for it; `site` tells the places of one pass apart. Its
  // backward is the same call on the gradient.
  void dropout(Context& ctx, const Tensor& x, std::uint64_t site) const;

  // Bytes of memory held now, tensors that share memory counted once; and the most there were at any
  // measure() since construction.
  [[nodiscard]] std::size_t bytes() const;
  [[nodiscard]] std::size_t peak_bytes() const { return peak_bytes_; }
  void measure();
  // Bytes by "module.tensor" at the fullest measure(), summed over layers, largest first.
  [[nodiscard]] const std::vector<std::pair<std::string, std::size_t>>& breakdown() const {
    return breakdown_;
  }

 private:
  TapeOptions options_;
  std::uint64_t pass_ = 0;
  bool recomputing_ = false;
  std::map<std::pair<int, std::string>, Frame, std::less<>> frames_;
  std::size_t peak_bytes_ = 0;
  std::vector<std::pair<std::string, std::size_t>> breakdown_;
};

}  // namespace krait
