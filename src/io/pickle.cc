#include "io/pickle.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "io/layout.h"
#include "io/text.h"
#include "krait/core/error.h"

namespace krait::io {
namespace {

// Far above what any checkpoint needs (a tensor takes some 300 bytes and 15 values), low enough that
// the memory a pickle can ask for stays below a gigabyte.
constexpr std::size_t kMaxBytes = std::size_t{64} << 20;
constexpr std::size_t kMaxValues = std::size_t{1} << 22;

constexpr std::string_view kOrderedDict = "collections OrderedDict";

// Values that every pickle has, in this order.
constexpr Pickle::Id kNone = 0;
constexpr Pickle::Id kFalse = 1;
constexpr Pickle::Id kTrue = 2;

enum Opcode : unsigned char {
  kMark = '(',
  kStop = '.',
  kPop = '0',
  kPopMark = '1',
  kDup = '2',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kNoneOp = 'N',
  kPersId = 'P',
  kBinPersId = 'Q',
  kReduce = 'R',
  kBinString = 'T',
  kShortBinString = 'U',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobal = 'c',
  kDict = 'd',
  kEmptyDict = '}',
  kAppends = 'e',
  kBinGet = 'h',
  kInst = 'i',
  kLongBinGet = 'j',
  kList = 'l',
  kEmptyList = ']',
  kObj = 'o',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTuple = 't',
  kEmptyTuple = ')',
  kSetItems = 'u',
  kBinFloat = 'G',
  kBinBytes = 'B',
  kShortBinBytes = 'C',
  kProto = 0x80,
  kNewObj = 0x81,
  kExt1 = 0x82,
  kExt2 = 0x83,
  kExt4 = 0x84,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
  kLong4 = 0x8b,
  kShortBinUnicode = 0x8c,
  kBinUnicode8 = 0x8d,
  kBinBytes8 = 0x8e,
  kNewObjEx = 0x92,
  kStackGlobal = 0x93,
  kMemoize = 0x94,
  kFrame = 0x95,
};

}  // namespace

Pickle::Pickle(std::span<const std::byte> bytes, std::span<const std::string_view> globals, std::string what)
    : what_(std::move(what)), bytes_(bytes), globals_(globals) {
  require(bytes.size() <= kMaxBytes, what_, " has ", bytes.size(), " bytes, expected at most ", kMaxBytes);
  make(Kind::none);
  make(Kind::boolean, 0);
  make(Kind::boolean, 1);
  run();
  require(at_ == bytes_.size(), what_, " goes on for ", bytes_.size() - at_, " bytes after its end");
}

void Pickle::run() {
  while (true) {
    const auto opcode = number<unsigned char>();
    switch (opcode) {
      case kProto: {
        const int version = number<unsigned char>();
        require(version >= 2 && version <= 5, what_, " has protocol ", version, ", expected 2 to 5");
        break;
      }
      case kFrame: {
        const auto size = number<std::uint64_t>();
        require(size <= bytes_.size() - at_, what_, " has a frame of ", size, " bytes with ",
                bytes_.size() - at_, " left");
        break;
      }
      case kStop:
        root_ = pop();
        require(stack_.empty() && marks_.empty(), what_, " ends with values left over");
        return;

      case kNoneOp: push(kNone); break;
      case kNewTrue: push(kTrue); break;
      case kNewFalse: push(kFalse); break;
      case kBinInt: push(make(Kind::integer, number<std::int32_t>())); break;
      case kBinInt1: push(make(Kind::integer, number<std::uint8_t>())); break;
      case kBinInt2: push(make(Kind::integer, number<std::uint16_t>())); break;
      case kLong1: push_long(take(number<std::uint8_t>())); break;
      case kLong4: push_long(take(number<std::uint32_t>())); break;
      case kBinFloat: {
        (void)take(8);
        push(make(Kind::real));
        break;
      }
      case kShortBinString:
      case kShortBinUnicode: push(make(Kind::text, 0, text_of(take(number<std::uint8_t>())))); break;
      case kBinString:
      case kBinUnicode: push(make(Kind::text, 0, text_of(take(number<std::uint32_t>())))); break;
      case kBinUnicode8: push(make(Kind::text, 0, text_of(take(number<std::uint64_t>())))); break;
      case kShortBinBytes: push(make(Kind::bytes, 0, text_of(take(number<std::uint8_t>())))); break;
      case kBinBytes: push(make(Kind::bytes, 0, text_of(take(number<std::uint32_t>())))); break;
      case kBinBytes8: push(make(Kind::bytes, 0, text_of(take(number<std::uint64_t>())))); break;

      case kMark:
        require(marks_.size() < kMaxValues, what_, " has more than ", kMaxValues, " open groups");
        marks_.push_back(stack_.size());
        break;
      case kPop:
        // Python's pickler drops a mark this way as well.
        if (!marks_.empty() && marks_.back() == stack_.size())
          marks_.pop_back();
        else
          pop();
        break;
      case kPopMark: (void)pop_to_mark(); break;
      case kDup: {
        const Id id = pop();
        push(id);
        push(id);
        break;
      }
      case kBinGet: recall(number<std::uint8_t>()); break;
      case kLongBinGet: recall(number<std::uint32_t>()); break;
      case kBinPut: memoize(number<std::uint8_t>()); break;
      case kLongBinPut: memoize(number<std::uint32_t>()); break;
      case kMemoize: memoize(static_cast<std::uint32_t>(memo_.size())); break;

      case kEmptyTuple: push(make(Kind::tuple)); break;
      case kTuple1: push_tuple(1); break;
      case kTuple2: push_tuple(2); break;
      case kTuple3: push_tuple(3); break;
      case kEmptyList: push(make(Kind::list)); break;
      case kEmptyDict: push(make(Kind::dict)); break;
      case kTuple:
      case kList:
      case kDict: {
        auto items = pop_to_mark();
        require(opcode != kDict || items.size() % 2 == 0, what_, " has a key without a value");
        const Id id = make(opcode == kTuple ? Kind::tuple : opcode == kList ? Kind::list : Kind::dict);
        values_[id].items = std::move(items);
        push(id);
        break;
      }
      case kAppend: {
        const Id item = pop();
        append(Kind::list, std::span(&item, 1));
        break;
      }
      case kAppends: append(Kind::list, pop_to_mark()); break;
      case kSetItem: {
        const Id value = pop();
        const Id key = pop();
        append(Kind::dict, std::array{key, value});
        break;
      }
      case kSetItems: append(Kind::dict, pop_to_mark()); break;

      case kGlobal: {
        const std::string_view module = line();
        push_global(module, line());
        break;
      }
      case kStackGlobal: {
        const Id name = pop();
        const Id module = pop();
        require(values_[name].kind == Kind::text && values_[module].kind == Kind::text, what_,
                " looks up a name that is not text");
        push_global(values_[module].text, values_[name].text);
        break;
      }
      case kBinPersId: {
        const Id name = pop();
        const Id id = make(Kind::persistent);
        values_[id].items = {name};
        push(id);
        break;
      }
      case kReduce: call(); break;
      case kBuild: build(); break;

      // What follows makes objects of any class. Naming a class is refused already; these are refused
      // even with the names that are allowed.
      case kInst: {
        const std::string_view module = line();
        push_global(module, line());
        refuse("INST");
      }
      case kObj: refuse("OBJ");
      case kNewObj: refuse("NEWOBJ");
      case kNewObjEx: refuse("NEWOBJ_EX");
      case kExt1:
      case kExt2:
      case kExt4: refuse("EXT");
      case kPersId: refuse("PERSID");
      default:
        fail(ErrorKind::invalid_argument, what_, " has opcode ", int{opcode}, " at byte ", at_ - 1,
             ", which torch.save does not write");
    }
  }
}

std::span<const std::byte> Pickle::take(std::uint64_t count) {
  require(count <= bytes_.size() - at_, what_, " is cut short at byte ", at_, ": ", count,
          " more bytes expected, ", bytes_.size() - at_, " left");
  const auto taken = bytes_.subspan(at_, static_cast<std::size_t>(count));
  at_ += taken.size();
  return taken;
}

template <typename T>
T Pickle::number() {
  return load<T>(take(sizeof(T)), 0);
}

std::string_view Pickle::line() {
  const std::string_view rest = text_of(bytes_.subspan(at_));
  const std::size_t end = rest.find('\n');
  require(end != std::string_view::npos, what_, " is cut short in a name");
  at_ += end + 1;
  return rest.substr(0, end);
}

Pickle::Id Pickle::make(Kind kind, std::int64_t integer, std::string_view text) {
  require(values_.size() < kMaxValues, what_, " has more than ", kMaxValues, " values");
  values_.push_back({.kind = kind, .integer = integer, .text = text});
  return static_cast<Id>(values_.size() - 1);
}

void Pickle::push(Id id) {
  require(stack_.size() < kMaxValues, what_, " has more than ", kMaxValues, " values on its stack");
  stack_.push_back(id);
}

Pickle::Id Pickle::pop() {
  require(stack_.size() > (marks_.empty() ? 0 : marks_.back()), what_, " takes a value from an empty stack");
  const Id id = stack_.back();
  stack_.pop_back();
  return id;
}

std::vector<Pickle::Id> Pickle::pop_to_mark() {
  require(!marks_.empty(), what_, " closes a group that was not opened");
  const auto first = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
  std::vector<Id> items(first, stack_.end());
  stack_.erase(first, stack_.end());
  marks_.pop_back();
  return items;
}

void Pickle::push_tuple(std::size_t count) {
  std::vector<Id> items(count);
  for (std::size_t i = count; i-- > 0;) items[i] = pop();
  const Id id = make(Kind::tuple);
  values_[id].items = std::move(items);
  push(id);
}

// Two's complement, least byte first, any length.
void Pickle::push_long(std::span<const std::byte> digits) {
  if (digits.size() > sizeof(std::int64_t)) {
    push(make(Kind::other));
    return;
  }
  const bool negative = !digits.empty() && (digits.back() & std::byte{0x80}) != std::byte{};
  std::int64_t value = negative ? -1 : 0;
  if (!digits.empty()) std::memcpy(&value, digits.data(), digits.size());
  push(make(Kind::integer, value));
}

void Pickle::push_global(std::string_view module, std::string_view name) {
  const auto is_it = [&](std::string_view known) {
    return known.size() == module.size() + 1 + name.size() && known.starts_with(module) &&
           known[module.size()] == ' ' && known.ends_with(name);
  };
  if (is_it(kOrderedDict)) {
    push(make(Kind::global, 0, kOrderedDict));
    return;
  }
  const auto found = std::find_if(globals_.begin(), globals_.end(), is_it);
  require(found != globals_.end(), what_, " asks for ", printable(concat(module, ".", name)),
          ", which a file of tensors has no use for: nothing was executed");
  push(make(Kind::global, 0, *found));
}

void Pickle::memoize(std::uint32_t index) {
  const Id id = pop();
  push(id);
  require(memo_.size() < kMaxValues, what_, " has more than ", kMaxValues, " values stored");
  memo_[index] = id;
}

void Pickle::recall(std::uint32_t index) {
  const auto found = memo_.find(index);
  require(found != memo_.end(), what_, " refers to value ", index, ", which it has not stored");
  push(found->second);
}

// Adds to the list or dict on top of the stack.
void Pickle::append(Kind kind, std::span<const Id> items) {
  const Id target = pop();
  require(values_[target].kind == kind, what_, " adds items to something that is no ",
          kind == Kind::list ? "list" : "dict");
  require(kind != Kind::dict || items.size() % 2 == 0, what_, " has a key without a value");
  values_[target].items.insert(values_[target].items.end(), items.begin(), items.end());
  push(target);
}

void Pickle::call() {
  const Id arguments = pop();
  const Id callee = pop();
  require(values_[arguments].kind == Kind::tuple && values_[callee].kind == Kind::global, what_,
          " calls something that is not a name, or without a tuple of arguments: nothing was executed");
  if (values_[callee].text == kOrderedDict) {
    require(values_[arguments].items.empty(), what_, " makes an OrderedDict with arguments, expected none");
    push(make(Kind::dict));
    return;
  }
  const Id id = make(Kind::call);
  values_[id].items = {callee, arguments};
  push(id);
}

// A state_dict is an OrderedDict with an attribute _metadata (versions of modules), which is set here.
void Pickle::build() {
  const Id state = pop();
  const Id target = pop();
  require(values_[state].kind == Kind::dict && values_[target].kind == Kind::dict, what_,
          " sets the state of an object that is no OrderedDict: nothing was executed");
  push(target);
}

void Pickle::refuse(std::string_view opcode) const {
  fail(ErrorKind::invalid_argument, what_, " has opcode ", opcode, " at byte ", at_ - 1,
       ", which makes an object that is no tensor: nothing was executed");
}

}  // namespace krait::io
