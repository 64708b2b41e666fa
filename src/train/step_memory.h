// Whether a step can fit the machine at all, asked before anything is read or written.
#pragma once

#include <cstdint>

#include "krait/models/language_model.h"
#include "krait/train/dataset.h"

namespace krait {

// Throws Error(invalid_argument) naming batch_size, seq_len or accumulate where one of them asks for more
// than `memory` bytes. It counts what a step holds whatever else is chosen, the ids of its batches and for
// each block the f32 input, so that a step which passes may still not fit. Sizes of 0 count as 1.
void require_step_fits(const ModelConfig& config, const DatasetOptions& sizes, std::int64_t accumulate,
                       double memory);

// Bytes of memory of this machine; infinity where the system does not say.
[[nodiscard]] double machine_memory();

}  // namespace krait
