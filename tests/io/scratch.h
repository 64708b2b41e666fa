// A directory for one test, and files in it.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "io/raw.h"
#include "krait/core/error.h"
#include "krait/core/tensor.h"

namespace krait::io {

class Scratch {
 public:
  Scratch() {
    std::string pattern = (std::filesystem::temp_directory_path() / "krait-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary directory");
    path_ = pattern;
  }
  ~Scratch() { std::filesystem::remove_all(path_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] std::filesystem::path operator/(std::string_view name) const { return path_ / name; }

  // Writes without any of the code under test.
  std::filesystem::path put(std::string_view name, std::string_view content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }
  [[nodiscard]] std::size_t count() const {
    const std::filesystem::directory_iterator files(path_);
    return static_cast<std::size_t>(std::distance(begin(files), end(files)));
  }

 private:
  std::filesystem::path path_;
};

inline std::string content_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A copy at exactly its size, so that the address sanitizer sees any read past its end, `misalign`
// bytes after an aligned address.
struct Memory {
  std::shared_ptr<std::byte[]> owner;
  std::span<const std::byte> bytes;

  explicit Memory(std::string_view content, std::size_t misalign = 0)
      : owner(new std::byte[content.size() + misalign]) {
    if (!content.empty()) std::memcpy(owner.get() + misalign, content.data(), content.size());
    bytes = {owner.get() + misalign, content.size()};
  }
};

// The message of the Error that `f` throws; "" where it throws none.
template <typename F>
std::string message_of(const F& f) {
  try {
    (void)f();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  return "";
}

inline ::testing::AssertionResult contains(const char*, const char*, std::string_view message,
                                           std::string_view part) {
  if (message.find(part) != std::string_view::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "the message is \"" << message << "\", expected \"" << part << "\" in it";
}

template <typename T>
std::vector<T> values_of(const Tensor& tensor) {
  const Tensor dense = tensor.contiguous();
  const auto span = dense.span<T>();
  return {span.begin(), span.end()};
}

// Expects an Error whose message contains `part`.
#define EXPECT_MESSAGE(statement, part) \
  EXPECT_PRED_FORMAT2(::krait::io::contains, ::krait::io::message_of([&] { return statement; }), part)

}  // namespace krait::io
