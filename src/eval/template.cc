#include "eval/template.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "eval/python_text.h"
#include "krait/core/error.h"

namespace krait {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxBytes = std::size_t{1} << 24U;  // of a text that is made here
constexpr int kMaxDepth = 64;                             // of parentheses, brackets and arguments

bool is_integer(const Json& value) {
  return value.is_number_integer() &&
         (!value.is_number_unsigned() ||
          value.get<std::uint64_t>() <= std::numeric_limits<std::int64_t>::max());
}

std::string kind_of(const Json& value) {
  return is_integer(value) ? "an integer" : concat("of type ", value.type_name());
}

std::string quoted(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

void check_size(const std::string& text) {
  require(text.size() <= kMaxBytes, "makes a text of more than ", kMaxBytes, " bytes");
}

const std::string& string_in(const Json& value, std::string_view what) {
  require(value.is_string(), what, " is ", kind_of(value), ", expected a text");
  return value.get_ref<const std::string&>();
}

const Json& list_in(const Json& value, std::string_view what) {
  require(value.is_array(), what, " is ", kind_of(value), ", expected a list");
  return value;
}

Json split(std::string_view text, const std::vector<Json>& arguments) {
  Json parts = Json::array();
  if (arguments.empty()) {  // at white space of any length
    for (text = strip(text); !text.empty();) {
      // The first place where taking away white space takes away something.
      std::size_t end = 0;
      while (end < text.size() && strip_left(text.substr(end)).size() == text.size() - end) ++end;
      parts.push_back(std::string(text.substr(0, end)));
      text = strip_left(text.substr(end));
    }
    return parts;
  }
  const std::string& separator = string_in(arguments[0], "the separator of split");
  require(!separator.empty(), "the separator of split is empty");
  for (;;) {
    const std::size_t end = text.find(separator);
    parts.push_back(std::string(text.substr(0, end)));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + separator.size());
  }
}

std::string join(const Json& list, std::string_view separator) {
  std::string text;
  for (std::size_t i = 0; i < list.size(); ++i) {
    text.append(i == 0 ? "" : separator).append(text_of(list[i]));
    check_size(text);
  }
  return text;
}

std::string replace(std::string_view text, const std::string& from, const std::string& to) {
  require(!from.empty(), "the text that replace looks for is empty");
  std::string out;
  for (;;) {
    const std::size_t at = text.find(from);
    out += text.substr(0, at);
    if (at == std::string_view::npos) return out;
    out += to;
    check_size(out);
    text.remove_prefix(at + from.size());
  }
}

std::int64_t index_of(const Json& list, const Json& value) {
  const auto found = std::ranges::find(list, value);
  require(found != list.end(), quoted(value), " is not in the list ", quoted(list));
  return found - list.begin();
}

// Reads an expression and computes it on the way.
class Expression {
 public:
  Expression(std::string_view text, const Json& document) : rest_(text), document_(document) {}

  Json value() {
    Json result = sum();
    skip_space();
    require(rest_.empty(), "'", rest_, "' is not understood");
    return result;
  }

 private:
  Json sum() {
    require(++depth_ <= kMaxDepth, "is nested more than ", kMaxDepth, " deep");
    Json result = filtered();
    for (;;) {
      if (take("+")) {
        result = sum_of(result, filtered());
      } else if (take("~")) {
        result = concatenation(text_of(result), text_of(filtered()));
      } else {
        --depth_;
        return result;
      }
    }
  }

  static Json sum_of(const Json& left, const Json& right) {
    if (!is_integer(left) || !is_integer(right))
      return concatenation(string_in(left, "the left side of +"), string_in(right, "the right side of +"));
    std::int64_t sum = 0;
    require(!__builtin_add_overflow(left.get<std::int64_t>(), right.get<std::int64_t>(), &sum), quoted(left),
            " + ", quoted(right), " is too large");
    return sum;
  }
  static Json concatenation(std::string left, const std::string& right) {
    left += right;
    check_size(left);
    return left;
  }

  Json filtered() {
    Json result = postfix();
    while (take("|")) {
      const std::string name = identifier("a filter");
      const std::vector<Json> arguments = take("(") ? list_until(")") : std::vector<Json>();
      result = filter(name, result, arguments);
    }
    return result;
  }

  Json postfix() {
    Json result = primary();
    for (;;) {
      if (take(".")) {
        const std::string name = identifier("a name after '.'");
        result = take("(") ? method(name, result, list_until(")")) : member(result, name);
      } else if (take("[")) {
        result = subscript(result);
      } else {
        return result;
      }
    }
  }

  Json primary() {
    skip_space();
    require(!rest_.empty(), "ends where a value was expected");
    if (take("(")) {
      Json result = sum();
      expect(")");
      return result;
    }
    if (take("[")) return list_until("]");
    if (rest_.front() == '\'' || rest_.front() == '"') return string_literal();
    if (const auto number = integer()) return *number;
    const std::string name = identifier("a value");
    require(document_.contains(name), "the document has no field '", name, "'");
    return document_[name];
  }

  Json member(const Json& object, const std::string& name) {
    require(object.is_object() && object.contains(name), "there is no '", name, "' in a value that is ",
            kind_of(object));
    return object[name];
  }

  Json subscript(const Json& of) {
    if (of.is_object()) {
      const Json name = sum();
      expect("]");
      return member(of, string_in(name, "a name in []"));
    }
    const Json& list = list_in(of, "what [] stands behind");
    const std::int64_t size = std::ssize(list);
    const auto counted = [&](std::int64_t i) { return i < 0 ? i + size : i; };
    std::optional<std::int64_t> first = integer();
    if (take(":")) {
      std::optional<std::int64_t> last = integer();
      expect("]");
      const auto begin = std::clamp<std::int64_t>(counted(first.value_or(0)), 0, size);
      const auto end = std::clamp<std::int64_t>(counted(last.value_or(size)), begin, size);
      return Json(std::vector<Json>(list.begin() + begin, list.begin() + end));
    }
    if (!first) {
      const Json index = sum();
      require(is_integer(index), "an index is ", kind_of(index), ", expected an integer");
      first = index.get<std::int64_t>();
    }
    expect("]");
    const std::int64_t at = counted(*first);
    require(at >= 0 && at < size, "index ", *first, " in a list of ", size);
    return list[static_cast<std::size_t>(at)];
  }

  static Json method(const std::string& name, const Json& self, const std::vector<Json>& arguments) {
    const auto takes = [&](std::size_t least, std::size_t most) {
      require(arguments.size() >= least && arguments.size() <= most, name, " has ", arguments.size(),
              " arguments, expected ", least, least == most ? "" : concat(" to ", most));
    };
    if (name == "index") {
      takes(1, 1);
      return index_of(list_in(self, "what index is asked of"), arguments[0]);
    }
    const auto text = [&]() -> const std::string& { return string_in(self, "what '" + name + "' works on"); };
    if (name == "split") {
      takes(0, 1);
      return split(text(), arguments);
    }
    if (name == "join") {
      takes(1, 1);
      return join(list_in(arguments[0], "what is joined"), text());
    }
    if (name == "replace") {
      takes(2, 2);
      return replace(text(), string_in(arguments[0], "an argument of replace"),
                     string_in(arguments[1], "an argument of replace"));
    }
    if (name == "strip" || name == "lstrip" || name == "rstrip") {
      takes(0, 0);
      return std::string(name == "strip"    ? strip(text())
                         : name == "lstrip" ? strip_left(text())
                                            : strip_right(text()));
    }
    fail(ErrorKind::invalid_argument, "method '", name,
         "' is not understood, expected index, join, lstrip, replace, rstrip, split or strip");
  }

  static Json filter(const std::string& name, const Json& self, const std::vector<Json>& arguments) {
    require(arguments.size() <= (name == "join" ? 1 : 0), "filter ", name, " has ", arguments.size(),
            " arguments");
    if (name == "trim") return std::string(strip(string_in(self, "what is trimmed")));
    const auto list = [&]() -> const Json& { return list_in(self, "what '" + name + "' works on"); };
    if (name == "join")
      return join(list(), arguments.empty() ? "" : string_in(arguments[0], "the separator of join"));
    if (name == "length")
      return self.is_string() ? count_characters(string_in(self, "")) : std::ssize(list());
    if (name == "first" || name == "last") {
      require(!list().empty(), "filter ", name, " of an empty list");
      return name == "first" ? list().front() : list().back();
    }
    fail(ErrorKind::invalid_argument, "filter '", name,
         "' is not understood, expected first, join, last, length or trim");
  }

  std::vector<Json> list_until(std::string_view end) {
    std::vector<Json> items;
    if (take(end)) return items;
    for (;;) {
      items.push_back(sum());
      if (take(end)) return items;
      expect(",");
    }
  }

  std::string string_literal() {
    const char quote = rest_.front();
    std::string text;
    for (std::size_t i = 1; i < rest_.size(); ++i) {
      if (rest_[i] == quote) {
        rest_.remove_prefix(i + 1);
        return text;
      }
      if (rest_[i] != '\\' || i + 1 == rest_.size()) {
        text += rest_[i];
        continue;
      }
      const char escaped = rest_[++i];
      switch (escaped) {
        case 'n': text += '\n'; break;
        case 't': text += '\t'; break;
        case '\\':
        case '\'':
        case '"': text += escaped; break;
        default: fail(ErrorKind::invalid_argument, "'\\", escaped, "' in a text is not understood");
      }
    }
    fail(ErrorKind::invalid_argument, "a text that begins with ", quote, " does not end");
  }

  std::optional<std::int64_t> integer() {
    skip_space();
    std::size_t size = rest_.starts_with('-') ? 1 : 0;
    const std::size_t sign = size;
    while (size < rest_.size() && rest_[size] >= '0' && rest_[size] <= '9') ++size;
    if (size == sign) return std::nullopt;
    constexpr std::size_t kMostDigits = 18;
    require(size - sign <= kMostDigits, "the number '", rest_.substr(0, size), "' is too large");
    const std::int64_t value = std::stoll(std::string(rest_.substr(0, size)));
    rest_.remove_prefix(size);
    return value;
  }

  std::string identifier(std::string_view what) {
    skip_space();
    std::size_t size = 0;
    const auto is_letter = [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    };
    while (size < rest_.size() &&
           (is_letter(rest_[size]) || (size > 0 && rest_[size] >= '0' && rest_[size] <= '9')))
      ++size;
    require(size > 0, "'", rest_, "' where ", what, " was expected");
    std::string name(rest_.substr(0, size));
    rest_.remove_prefix(size);
    return name;
  }

  void skip_space() { rest_ = strip_left(rest_); }
  bool take(std::string_view symbol) {
    skip_space();
    if (!rest_.starts_with(symbol)) return false;
    rest_.remove_prefix(symbol.size());
    return true;
  }
  void expect(std::string_view symbol) {
    require(take(symbol), "'", rest_, "' where '", symbol, "' was expected");
  }

  std::string_view rest_;
  const Json& document_;
  int depth_ = 0;
};

// Where the expression that `text` begins with ends: at the first }} outside of a text in quotes.
std::size_t end_of_expression(std::string_view text) {
  char quote = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (quote != 0 && text[i] == '\\') {
      ++i;
    } else if (quote != 0) {
      if (text[i] == quote) quote = 0;
    } else if (text[i] == '\'' || text[i] == '"') {
      quote = text[i];
    } else if (text.substr(i).starts_with("}}")) {
      return i;
    }
  }
  return std::string_view::npos;
}

}  // namespace

std::string text_of(const Json& value) {
  if (is_integer(value)) return std::to_string(value.get<std::int64_t>());
  return string_in(value, "a value");
}

Json evaluate_template(std::string_view text, const Json& document) {
  const std::string_view whole = text;
  try {
    std::string out;
    for (;;) {
      const bool from_start = text.size() == whole.size();
      const std::size_t begin = std::min({text.find("{{"), text.find("{%"), text.find("{#")});
      out += text.substr(0, begin);
      if (begin == std::string_view::npos) return out;
      text.remove_prefix(begin);
      require(text.starts_with("{{"), "'", text.substr(0, 2), "' is not understood, expected {{ alone");
      text.remove_prefix(2);
      const std::size_t end = end_of_expression(text);
      require(end != std::string_view::npos, "a {{ has no }}");
      const Json value = Expression(text.substr(0, end), document).value();
      text.remove_prefix(end + 2);
      if (from_start && begin == 0 && text.empty()) return value;
      out += text_of(value);
    }
  } catch (const Error& error) {
    fail(error.kind(), "template ", Json(whole).dump(-1, ' ', false, Json::error_handler_t::replace), ": ",
         error.what());
  }
}

}  // namespace krait
