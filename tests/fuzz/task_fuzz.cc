// A description of a task, or documents, of any bytes either is read or refused with an Error.
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "krait/core/error.h"
#include "krait/eval/tasks.h"

namespace {

// A directory of this process, for files that are read by their names.
const std::filesystem::path& directory() {
  static const std::filesystem::path path = [] {
    auto made = std::filesystem::temp_directory_path() / ("krait-fuzz-task-" + std::to_string(::getpid()));
    std::filesystem::create_directories(made);
    std::atexit([] { std::filesystem::remove_all(directory()); });
    return made;
  }();
  return path;
}

void read(const char* name, std::string_view content) {
  const std::filesystem::path path = directory() / name;
  std::ofstream(path, std::ios::binary) << content;
  try {
    const krait::Task task = krait::read_task(path);
    if (task.documents.empty()) std::abort();
    for (const krait::TaskDocument& document : task.documents)
      for (const std::int64_t gold : document.gold)
        if (gold < 0 || gold >= static_cast<std::int64_t>(document.requests.size())) std::abort();
  } catch (const krait::Error&) {
  }
}

}  // namespace

// The description is the first line, the documents are what follows.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const std::size_t end = all.find('\n');
  const std::string_view rest = end == std::string_view::npos ? "" : all.substr(end + 1);
  std::ofstream(directory() / "docs.jsonl", std::ios::binary) << rest;
  read("task.json", all.substr(0, end));
  read("alone.jsonl", all);
  return 0;
}
