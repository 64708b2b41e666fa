#include <hwy/targets.h>

#include <bit>
#include <cstdint>

#include "krait/core/context.h"

namespace krait {

std::string_view simd_target() {
  // Highway numbers better targets lower: of those compiled, the lowest set bit is the one that dispatch
  // takes.
  // Asking the processor takes microseconds in a virtual machine, and every operator names its path.
  static const auto targets = static_cast<std::uint64_t>(hwy::SupportedTargets() & HWY_TARGETS);
  return hwy::TargetName(static_cast<std::int64_t>(targets & (~targets + 1)));
}

}  // namespace krait
