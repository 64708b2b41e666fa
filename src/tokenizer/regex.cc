#include "tokenizer/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <cstdint>
#include <optional>

#include "krait/core/error.h"
#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

constexpr std::uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
constexpr std::uint32_t kMatchLimit = 10'000'000;   // PCRE2's default, whatever the system's is
constexpr std::uint32_t kHeapLimitKib = 64 * 1024;  // of the interpreter
constexpr std::size_t kJitStackMax = std::size_t{4} << 20;

// Oniguruma's \s is the property White_Space, where PCRE2's takes U+180E in; its \w is wider; its \h is
// a hexadecimal digit.
constexpr std::string_view kSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kNotSpace =
    R"(\x{0}-\x{8}\x{e}-\x{1f}\x{21}-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027})"
    R"(\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff})";
constexpr std::string_view kWord = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kHexDigit = "0-9a-fA-F";

struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
using CodePtr = std::unique_ptr<pcre2_code, CodeDeleter>;

// Null where the pattern does not compile; `error` and `offset` say why.
CodePtr compile(std::string_view pattern, int* error, std::size_t* offset) {
  struct ContextDeleter {
    void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
  };
  const std::unique_ptr<pcre2_compile_context, ContextDeleter> context(pcre2_compile_context_create(nullptr));
  if (context) pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  return CodePtr(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), kOptions, error,
                               offset, context.get()));
}

bool compiles(std::string_view pattern) {
  int error = 0;
  std::size_t offset = 0;
  return compile(pattern, &error, &offset) != nullptr;
}

std::string message_of(int error) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(error, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

// Walks a pattern once and rewrites what PCRE2 reads differently.
class Translator {
 public:
  Translator(std::string_view pattern, std::string_view where) : pattern_(pattern), where_(where) {}

  std::string run() {
    while (at_ < pattern_.size()) {
      if (pattern_[at_] == '\\') {
        escape();
      } else if (in_class_) {
        class_character();
      } else if (looking_at("(?")) {
        group_options();
      } else {
        if (pattern_[at_] == '[') enter_class();
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  bool looking_at(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  void copy(std::size_t count) {
    out_.append(pattern_.substr(at_, count));
    at_ += count;
  }
  [[noreturn]] void refuse(std::string_view what) const {
    fail(ErrorKind::invalid_argument, where_, ": the pattern ", in_quotes(pattern_), " uses ", what,
         ", which is not supported");
  }

  void enter_class() {
    in_class_ = true;
    class_begin_ = at_ + (looking_at("[^") ? 2 : 1);
    if (class_begin_ == at_ + 2) copy(1);
  }

  void class_character() {
    if (looking_at("[:")) {
      const std::size_t end = pattern_.find(":]", at_ + 2);
      if (end == std::string_view::npos) refuse("a nested character class");
      copy(end + 2 - at_);
      return;
    }
    if (looking_at("[")) refuse("a nested character class");
    if (looking_at("&&")) refuse("an intersection of character classes");
    if (pattern_[at_] == ']' && at_ != class_begin_) in_class_ = false;
    copy(1);
  }

  // "(?i:" and the like: Ruby's option m is what PCRE2 calls s.
  void group_options() {
    copy(2);
    while (at_ < pattern_.size() && std::string_view("imx-").find(pattern_[at_]) != std::string_view::npos) {
      out_.push_back(pattern_[at_] == 'm' ? 's' : pattern_[at_]);
      ++at_;
    }
  }

  void put_class(std::string_view members) {
    if (in_class_) {
      out_.append(members);
    } else {
      out_.append("[").append(members).append("]");
    }
    at_ += 2;
  }
  void put_complement(std::string_view members) {
    if (in_class_) refuse(concat("'", pattern_.substr(at_, 2), "' in a character class"));
    out_.append("[^").append(members).append("]");
    at_ += 2;
  }

  void escape() {
    const char kind = at_ + 1 < pattern_.size() ? pattern_[at_ + 1] : '\0';
    switch (kind) {
      case 's': return put_class(kSpace);
      case 'S': return put_class(kNotSpace);
      case 'w': return put_class(kWord);
      case 'W': return put_complement(kWord);
      case 'h': return put_class(kHexDigit);
      case 'H': return put_complement(kHexDigit);
      case 'b':
      case 'B':
        if (!in_class_) return word_boundary(kind == 'b');
        break;
      case 'p':
      case 'P':
        if (looking_at("\\p{") || looking_at("\\P{")) return property();
        break;
      default: break;
    }
    copy(std::min<std::size_t>(2, pattern_.size() - at_));
  }

  // Where a word, in the sense of kWord, begins or ends; or where none does.
  void word_boundary(bool wanted) {
    const std::string word = concat("[", kWord, "]");
    out_.append(wanted ? "(?:" : "(?!");
    out_.append(concat("(?<=", word, ")(?!", word, ")|(?<!", word, ")(?=", word, "))"));
    at_ += 2;
  }

  // \p{Han}: a script, not what PCRE2 takes it for, its extensions.
  void property() {
    const std::size_t end = pattern_.find('}', at_);
    if (end == std::string_view::npos) return copy(2);
    std::string_view name = pattern_.substr(at_ + 3, end - at_ - 3);
    const bool negated = name.starts_with("^");
    if (negated) name.remove_prefix(1);
    const bool is_script = name.size() > 2 && name.size() < 40 && compiles(concat("\\p{sc:", name, "}"));
    if (!is_script) return copy(end + 1 - at_);
    out_.append(pattern_.substr(at_, 3)).append(negated ? "^sc:" : "sc:").append(name).append("}");
    at_ = end + 1;
  }

  std::string_view pattern_;
  std::string_view where_;
  std::string out_;
  std::size_t at_ = 0;
  std::size_t class_begin_ = 0;
  bool in_class_ = false;
};

}  // namespace

struct Regex::Code {
  CodePtr code;
  std::string pattern;
  std::string where;

  [[noreturn]] void refuse(std::string_view why) const {
    fail(ErrorKind::invalid_argument, where, ": the pattern ", in_quotes(pattern), " ", why);
  }
};

struct Regex::Workspace::Memory {
  // One pair of offsets: only the whole match is wanted.
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = pcre2_jit_stack_create(32 * 1024, kJitStackMax, nullptr);

  Memory() {
    if (context == nullptr) return;
    pcre2_set_match_limit(context, kMatchLimit);
    pcre2_set_heap_limit(context, kHeapLimitKib);
    if (stack != nullptr) pcre2_jit_stack_assign(context, nullptr, stack);
  }
  ~Memory() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    pcre2_jit_stack_free(stack);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

Regex::Workspace::Workspace() = default;
Regex::Workspace::~Workspace() = default;

std::string pattern_for_pcre2(std::string_view pattern, std::string_view where) {
  return Translator(pattern, where).run();
}

Regex::Regex(std::string_view pattern, std::string_view where) {
  const std::string translated = pattern_for_pcre2(pattern, where);
  int error = 0;
  std::size_t offset = 0;
  auto code = compile(translated, &error, &offset);
  if (!code) {
    fail(ErrorKind::invalid_argument, where, ": the pattern ", in_quotes(pattern),
         " does not compile: ", message_of(error));
  }
  // Where the system forbids generated code PCRE2 interprets the pattern, with the same matches.
  pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  code_ = std::make_shared<Code>(Code{std::move(code), std::string(pattern), std::string(where)});
}

void Regex::find_all(std::string_view text, Workspace& workspace, std::vector<Range>& matches) const {
  if (text.empty()) return;
  if (!workspace.memory_) workspace.memory_ = std::make_unique<Workspace::Memory>();
  Workspace::Memory& memory = *workspace.memory_;
  if (memory.data == nullptr || memory.context == nullptr || memory.stack == nullptr) {
    fail(ErrorKind::out_of_memory, code_->where, ": no memory to match the pattern ",
         in_quotes(code_->pattern));
  }
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::size_t from = 0;
  std::optional<std::size_t> last_end;
  while (from <= text.size()) {
    const int result = pcre2_match(code_->code.get(), subject, text.size(), from, PCRE2_NO_UTF_CHECK,
                                   memory.data, memory.context);
    if (result == PCRE2_ERROR_NOMATCH) return;
    if (result < 0)
      code_->refuse(concat("gives up on a text of ", text.size(), " bytes: ", message_of(result)));
    const std::size_t* offsets = pcre2_get_ovector_pointer(memory.data);
    const Range match{offsets[0], offsets[1]};
    // \K in a lookaround can end a match before its beginning, or begin one before the last.
    if (match.begin > match.end || match.begin < last_end.value_or(0)) {
      code_->refuse("gives matches out of order");
    }
    if (match.begin == match.end && last_end == match.end) {
      if (from >= text.size()) return;
      from += code_point_at(text, from).length;
      continue;
    }
    matches.push_back(match);
    from = match.end;
    last_end = match.end;
  }
}

}  // namespace krait::tokenizer
