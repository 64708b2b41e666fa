// What subcommands read: checkpoints, texts and token ids.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "krait/core/tensor.h"
#include "krait/models/load.h"
#include "options.h"

namespace krait::cli {

// The checkpoint that --model names, downloaded first where that is needed (with a progress bar on stderr).
ModelFiles open_checkpoint(const CommonOptions& options);

// Draws a bar on stderr where that is a terminal and --quiet is not given: bytes done, bytes of all.
std::function<void(std::uint64_t, std::uint64_t)> progress_of(std::string_view what,
                                                              const CommonOptions& options);

// The whole of a text file, or of standard input for "-".
std::string read_text(const std::string& path);
// Its lines, without their ends.
std::vector<std::string> read_lines(const std::string& path);

// Token ids of a .npy file, (batch, length) i64 or i32, as i64.
Tensor read_ids(const std::string& path);
// The rows of such a tensor.
std::vector<std::vector<std::int64_t>> rows_of(const Tensor& ids);

}  // namespace krait::cli
