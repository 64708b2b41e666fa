// Runs a test body once for each SIMD target of this program and processor. Any source with Highway code has
// the same HWY_TARGETS.
#pragma once

#include <gtest/gtest.h>
#include <hwy/highway.h>
#include <hwy/targets.h>

#include <cstdint>

namespace krait::testing {

template <typename Body>
void on_each_target(const Body& body) {
  auto targets = static_cast<std::uint64_t>(hwy::SupportedTargets() & HWY_TARGETS);
  for (; targets != 0; targets &= targets - 1) {
    const auto target = static_cast<std::int64_t>(targets & (~targets + 1));
    hwy::SetSupportedTargetsForTest(target);
    SCOPED_TRACE(hwy::TargetName(target));
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
}

}  // namespace krait::testing
