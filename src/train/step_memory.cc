#include "train/step_memory.h"

#include <unistd.h>

#include <algorithm>
#include <iomanip>
#include <limits>
#include <sstream>
#include <string>

#include "krait/core/error.h"

namespace krait {
namespace {

std::string gib(double bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << bytes / (1024.0 * 1024.0 * 1024.0) << " GiB";
  return text.str();
}

}  // namespace

void require_step_fits(const ModelConfig& config, const DatasetOptions& sizes, std::int64_t accumulate,
                       double memory) {
  constexpr double kIdBytes = 2 * sizeof(std::int64_t);  // input and target
  const double block_inputs =
      sizeof(float) * static_cast<double>(config.d_model) * static_cast<double>(config.n_layer);
  // In f64, which does not overflow.
  const auto bytes = [&](double rows, double length, double batches) {
    return rows * length * (kIdBytes * batches + block_inputs) + sizeof(TrainingBatch) * batches;
  };
  const auto rows = static_cast<double>(std::max<std::int64_t>(sizes.batch_size, 1));
  const auto length = static_cast<double>(std::max<std::int64_t>(sizes.seq_len, 1));
  const double needed = bytes(rows, length, static_cast<double>(accumulate));
  if (needed <= memory) return;
  const auto too_large = [&](const char* name, std::int64_t value) {
    fail(ErrorKind::invalid_argument, name, " is ", value, ": a step would need at least ", gib(needed),
         " of memory, and this machine has ", gib(memory));
  };
  // The first that would do with a small one of it alone.
  if (bytes(rows, length, 1) <= memory) too_large("accumulate", accumulate);
  if (bytes(1, length, 1) <= memory) too_large("batch_size", sizes.batch_size);
  too_large("seq_len", sizes.seq_len);
}

double machine_memory() {
  const auto pages = static_cast<double>(::sysconf(_SC_PHYS_PAGES));
  const auto page_bytes = static_cast<double>(::sysconf(_SC_PAGESIZE));
  return pages > 0.0 && page_bytes > 0.0 ? pages * page_bytes : std::numeric_limits<double>::infinity();
}

}  // namespace krait
