// Settings as JSON and TOML.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "io/json.h"
#include "io/text.h"
#include "krait/core/error.h"
#include "krait/io/mapped_file.h"
#include "krait/train/settings.h"
#include "train/toml.h"

namespace krait {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 20;

std::string shown(const json& value) {
  if (value.is_string()) return "'" + value.get<std::string>() + "'";
  // TOML has them, JSON has no name for them.
  if (value.is_number_float() && !std::isfinite(value.get<double>())) return concat(value.get<double>());
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

// "A,B" without what is empty.
std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> items;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(','), text.size());
    if (end > 0) items.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return items;
}

std::optional<double> parse_number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// Puts a JSON value into a setting; `what` begins messages.
class Assign {
 public:
  Assign(const Setting& setting, const json& value, const std::string& what)
      : setting_(setting), value_(value), what_(what) {}

  void operator()(bool* place) const {
    if (!value_.is_boolean()) wrong("true or false");
    *place = value_.get<bool>();
  }
  void operator()(const Setting::Integer& place) const {
    const bool fits = value_.is_number_integer() &&
                      (!value_.is_number_unsigned() || value_.get<std::uint64_t>() <= INT64_MAX);
    if (!fits || !place.allows(value_.get<std::int64_t>())) wrong(place.expected());
    *place.value = value_.get<std::int64_t>();
  }
  void operator()(const Setting::Number& place) const {
    const double found = value_.is_number() ? value_.get<double>() : NAN;
    if (!place.allows(found)) wrong(place.expected());
    *place.value = found;
  }
  void operator()(const Setting::Choice& place) const {
    std::string expected;
    for (const std::string& name : place.names) {
      if (value_ == name) return place.set(name);
      expected += (expected.empty() ? "" : "|") + name;
    }
    wrong(expected);
  }
  void operator()(std::string* place) const {
    if (!value_.is_string()) wrong("a text");
    *place = value_.get<std::string>();
  }
  void operator()(std::vector<std::string>* place) const {
    if (value_.is_string()) {
      const auto& text = value_.get_ref<const std::string&>();
      *place = setting_.commas ? split(text) : std::vector{text};
      return;
    }
    if (!value_.is_array()) wrong("a list of texts");
    std::vector<std::string> items;
    for (const json& item : value_) {
      if (!item.is_string()) wrong("a list of texts");
      items.push_back(item.get<std::string>());
    }
    *place = std::move(items);
  }
  void operator()(std::vector<double>* place) const {
    std::vector<double> items;
    if (value_.is_string()) {
      for (const std::string& item : split(value_.get_ref<const std::string&>())) {
        const auto number = parse_number(item);
        if (!number) wrong("a list of numbers");
        items.push_back(*number);
      }
    } else {
      if (!value_.is_array()) wrong("a list of numbers");
      for (const json& item : value_) {
        if (!item.is_number()) wrong("a list of numbers");
        items.push_back(item.get<double>());
      }
    }
    *place = std::move(items);
  }

 private:
  [[noreturn]] void wrong(std::string_view expected) const {
    fail(ErrorKind::invalid_argument, what_, setting_.name, " is ", shown(value_), ", expected ", expected);
  }

  const Setting& setting_;
  const json& value_;
  const std::string& what_;
};

void assign_all(const json& object, const std::string& name, TrainSettings& settings) {
  require(object.is_object(), name, ": is ", object.type_name(), ", expected an object of settings");
  TrainSettings result = settings;
  const std::vector<Setting> table = settings_table(result);
  std::set<std::string> seen;
  const std::string what = name + ": ";
  for (const auto& [key, value] : object.items()) {
    std::string wanted = key;
    std::replace(wanted.begin(), wanted.end(), '-', '_');
    const auto found =
        std::find_if(table.begin(), table.end(), [&](const Setting& s) { return s.name == wanted; });
    require(found != table.end(), name, ": unknown setting ", io::printable(key));
    require(seen.insert(wanted).second, name, ": setting ", wanted, " is given twice");
    std::visit(Assign(*found, value, what), found->place);
  }
  settings = result;
}

}  // namespace

void set_from_text(const Setting& setting, std::string_view text) {
  const std::string none;
  const bool is_text = std::holds_alternative<std::string*>(setting.place) ||
                       std::holds_alternative<std::vector<std::string>*>(setting.place) ||
                       std::holds_alternative<std::vector<double>*>(setting.place) ||
                       std::holds_alternative<Setting::Choice>(setting.place);
  const json value = is_text ? json(text) : json::parse(text, nullptr, /*allow_exceptions=*/false);
  std::visit(Assign(setting, value.is_discarded() ? json(text) : value, none), setting.place);
}

void parse_settings_json(std::string_view text, const std::string& name, TrainSettings& settings) {
  assign_all(io::parse_json(text, 4, name + ": the file"), name, settings);
}

void parse_settings_toml(std::string_view text, const std::string& name, TrainSettings& settings) {
  assign_all(parse_toml(text, name), name, settings);
}

void read_settings(const std::filesystem::path& path, TrainSettings& settings) {
  const std::string name = path.string();
  const std::string kind = path.extension().string();
  require(kind == ".json" || kind == ".toml", name, ": the name ends in ", io::printable(kind),
          ", expected .json or .toml");
  const std::string text = io::read_file(path, kMaxFileBytes);
  kind == ".json" ? parse_settings_json(text, name, settings) : parse_settings_toml(text, name, settings);
}

std::string value_text(const Setting& setting) {
  const json value = std::visit(
      [](const auto& place) -> json {
        using Place = std::decay_t<decltype(place)>;
        if constexpr (std::is_same_v<Place, Setting::Choice>)
          return place.get();
        else if constexpr (std::is_same_v<Place, Setting::Integer> || std::is_same_v<Place, Setting::Number>)
          return *place.value;
        else
          return *place;
      },
      setting.place);
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string settings_json(const TrainSettings& settings) {
  TrainSettings copy = settings;
  std::string text = "{";
  for (const Setting& setting : settings_table(copy))
    text += concat(text.size() > 1 ? ",\n" : "\n", "  \"", setting.name, "\": ", value_text(setting));
  return text + "\n}\n";
}

}  // namespace krait
