#include "input.h"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <sstream>

#include "krait/core/error.h"
#include "krait/io/hub.h"
#include "krait/io/npy.h"
#include "terminal.h"

namespace krait::cli {

ModelFiles open_checkpoint(const CommonOptions& options) {
  hub::Options hub_options = hub::options_from_environment();
  hub::ProgressBar bar;
  if (!options.quiet) hub_options.progress = std::ref(bar);
  hub_options.cancelled = interrupted;
  hub_options.log = context_options(options).log;
  return open_model(options.model, hub_options);
}

std::function<void(std::uint64_t, std::uint64_t)> progress_of(std::string_view what,
                                                              const CommonOptions& options) {
  if (options.quiet || ::isatty(STDERR_FILENO) == 0) return {};
  return [bar = std::make_shared<hub::ProgressBar>(), what = std::string(what)](std::uint64_t done,
                                                                                std::uint64_t total) {
    const bool complete = done == total;
    (*bar)({.file = what, .bytes_done = done, .bytes_total = total, .complete = complete});
  };
}

std::string read_text(const std::string& path) {
  std::ostringstream text;
  if (path == "-") {
    text << std::cin.rdbuf();
    require(!std::cin.bad(), "standard input cannot be read");
    return text.str();
  }
  const std::filesystem::path file(path);
  if (!std::filesystem::exists(file)) fail(ErrorKind::not_found, path, ": no such file");
  require(!std::filesystem::is_directory(file), path, ": is a directory, expected a text file");
  std::ifstream in(file, std::ios::binary);
  if (!in) fail(ErrorKind::io, path, ": cannot be opened: ", std::strerror(errno));
  if (in.peek() != std::ifstream::traits_type::eof()) text << in.rdbuf();
  if (in.bad() || text.bad()) fail(ErrorKind::io, path, ": cannot be read: ", std::strerror(errno));
  return text.str();
}

std::vector<std::string> read_lines(const std::string& path) {
  std::istringstream text(read_text(path));
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) {
    if (line.ends_with('\r')) line.pop_back();
    lines.push_back(line);
  }
  return lines;
}

Tensor read_ids(const std::string& path) {
  const Tensor ids = io::read_npy(path);
  require(ids.dtype() == DType::i64 || ids.dtype() == DType::i32, path, ": array has dtype ", ids.dtype(),
          ", expected i64: token ids");
  require(ids.ndim() == 2, path, ": array has shape ", ids.shape(), ", expected (batch, length)");
  require(ids.numel() > 0, path, ": array has shape ", ids.shape(),
          ", expected at least one token in each row");
  return ids.to(DType::i64).contiguous();
}

std::vector<std::vector<std::int64_t>> rows_of(const Tensor& ids) {
  std::vector<std::vector<std::int64_t>> rows;
  for (std::int64_t i = 0; i < ids.size(0); ++i) {
    const auto row = ids.select(0, i).span<std::int64_t>();
    rows.emplace_back(row.begin(), row.end());
  }
  return rows;
}

}  // namespace krait::cli
