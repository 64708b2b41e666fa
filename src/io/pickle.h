// A reader of Python pickles (protocols 2 to 5; the opcodes are documented in CPython's
// Lib/pickletools.py) that turns the program into data and runs none of it: a call becomes a value
// that says which name was to be called with which arguments, and names are taken from a list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace krait::io {

class Pickle {
 public:
  // Values refer to each other by number, so that cycles and depth cost nothing.
  using Id = std::uint32_t;

  enum class Kind : std::uint8_t {
    none,
    boolean,     // integer: 0 or 1
    integer,     // integer
    real,        // the number itself is not kept
    text,        // text: UTF-8
    bytes,       // text: raw
    tuple,       // items
    list,        // items
    dict,        // items: key, value, key, value, ...; also an OrderedDict
    global,      // text: "module name"
    call,        // items: the global and the tuple of its arguments
    persistent,  // items: the one value that names an object outside of the pickle
    other,       // a number too large for 64 bits
  };

  struct Value {
    Kind kind = Kind::none;
    std::int64_t integer = 0;
    std::string_view text;
    std::vector<Id> items;
  };

  // Reads `bytes`, which must outlive the pickle (text is not copied). `globals` are the names, as
  // "module name", that the pickle may use besides "collections OrderedDict". Throws
  // Error(invalid_argument), each message beginning with `what`.
  Pickle(std::span<const std::byte> bytes, std::span<const std::string_view> globals, std::string what);

  [[nodiscard]] Id root() const { return root_; }
  [[nodiscard]] const Value& operator[](Id id) const { return values_[id]; }

 private:
  // The machine: bytes in, a stack, and a memo of values seen before.
  void run();
  [[nodiscard]] std::span<const std::byte> take(std::uint64_t count);
  template <typename T>
  [[nodiscard]] T number();
  [[nodiscard]] std::string_view line();
  Id make(Kind kind, std::int64_t integer = 0, std::string_view text = {});
  void push(Id id);
  Id pop();
  [[nodiscard]] std::vector<Id> pop_to_mark();
  void push_tuple(std::size_t count);
  void push_long(std::span<const std::byte> digits);
  void push_global(std::string_view module, std::string_view name);
  void memoize(std::uint32_t index);
  void recall(std::uint32_t index);
  void append(Kind kind, std::span<const Id> items);
  void call();
  void build();
  [[noreturn]] void refuse(std::string_view opcode) const;

  std::string what_;
  std::span<const std::byte> bytes_;
  std::span<const std::string_view> globals_;
  std::size_t at_ = 0;
  std::vector<Value> values_;
  std::vector<Id> stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint32_t, Id> memo_;
  Id root_ = 0;
};

}  // namespace krait::io
