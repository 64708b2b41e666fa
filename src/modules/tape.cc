#include "krait/modules/tape.h"

#include <algorithm>
#include <set>

#include "krait/core/error.h"
#include "krait/ops/dropout.h"

namespace krait {

Tape::Tape(const TapeOptions& options) : options_(options) {
  require(options.dropout >= 0.0 && options.dropout < 1.0, "dropout is ", options.dropout,
          ", expected at least 0 and less than 1");
}

void Tape::Frame::keep(std::string_view name, const Tensor& tensor) {
  tensors_.insert_or_assign(std::string(name), tensor);
}

bool Tape::Frame::has(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }

const Tensor& Tape::Frame::operator[](std::string_view name) const {
  const auto it = tensors_.find(name);
  require(it != tensors_.end(), "backward reads \"", name, "\", which no forward kept on this tape");
  return it->second;
}

void Tape::begin(std::uint64_t pass) {
  frames_.clear();
  pass_ = pass;
  recomputing_ = false;
}

Tape::Frame& Tape::frame(int layer, std::string_view module) { return frames_[{layer, std::string(module)}]; }

void Tape::drop(int layer) {
  std::erase_if(frames_, [&](const auto& entry) { return entry.first.first == layer; });
}

void Tape::drop(int layer, std::string_view module) { frames_.erase({layer, std::string(module)}); }

void Tape::dropout(Context& ctx, const Tensor& x, std::uint64_t site) const {
  if (options_.dropout == 0.0) return;
  constexpr std::uint64_t kSites = std::uint64_t{1} << 20U;  // of one pass
  krait::dropout(ctx, {.x = x,
                       .probability = options_.dropout,
                       .seed = options_.seed,
                       .stream = pass_ * kSites + site,
                       .out = x});
}

std::size_t Tape::bytes() const {
  std::set<const void*> seen;
  std::size_t bytes = 0;
  for (const auto& [place, frame] : frames_)
    for (const auto& [name, tensor] : frame.tensors_)
      if (seen.insert(tensor.owner().get()).second) bytes += tensor.nbytes();
  return bytes;
}

void Tape::measure() {
  const std::size_t now = bytes();
  if (now <= peak_bytes_) return;
  peak_bytes_ = now;
  std::set<const void*> seen;
  std::map<std::string, std::size_t> sums;
  for (const auto& [place, frame] : frames_)
    for (const auto& [name, tensor] : frame.tensors_)
      if (seen.insert(tensor.owner().get()).second) sums[place.second + "." + name] += tensor.nbytes();
  breakdown_.assign(sums.begin(), sums.end());
  std::sort(breakdown_.begin(), breakdown_.end(),
            [](const auto& a, const auto& b) { return a.second > b.second; });
}

}  // namespace krait
