#include <algorithm>

#include "krait/core/error.h"
#include "krait/generate/generate.h"

namespace krait {

StopText::StopText(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_)
    require(!stop.empty(), "a stop text is empty, expected at least one character");
}

std::string StopText::push(std::string_view piece) {
  if (stopped_) return "";
  held_.append(piece);
  std::size_t first = std::string::npos;
  for (const std::string& stop : stops_) first = std::min(first, held_.find(stop));
  if (first != std::string::npos) {
    stopped_ = true;
    std::string out = held_.substr(0, first);
    held_.clear();
    return out;
  }
  // The longest end of the text that some stop text begins with stays.
  std::size_t keep = 0;
  for (const std::string& stop : stops_)
    for (std::size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n)
      if (std::string_view(held_).substr(held_.size() - n) == std::string_view(stop).substr(0, n)) keep = n;
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  return out;
}

std::string StopText::finish() {
  std::string out = std::move(held_);
  held_.clear();
  return out;
}

}  // namespace krait
