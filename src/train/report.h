// A training run as one page of HTML that needs nothing beside it: curves, settings and samples.
#pragma once

#include <string>

#include "train/run_log.h"

namespace krait::report {

// Curves are drawn for the keys that runs log, and one each for all others.
[[nodiscard]] std::string render(const RunLog& log);

}  // namespace krait::report
