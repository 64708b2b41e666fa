// Sequences cut from a stream of tokens, in seeded order.
#pragma once

#include <memory>
#include <string>

#include "krait/train/dataset.h"
#include "train/token_stream.h"

namespace krait::dataset {

// Throws Error(invalid_argument), beginning with `name`, where the stream is too short for the options.
[[nodiscard]] std::unique_ptr<Dataset> stream_dataset(TokenStream stream, const DatasetOptions& options,
                                                      const std::string& name);

}  // namespace krait::dataset
