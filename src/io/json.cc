#include "io/json.h"

#include <set>
#include <vector>

#include "io/text.h"
#include "krait/core/error.h"

namespace krait::io {

nlohmann::json parse_json(std::string_view text, int max_depth, const std::string& what) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;  // of the objects that are open
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        require(depth < max_depth, what, " is nested deeper than ", max_depth, " levels");
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        break;
      case json::parse_event_t::object_end: keys.pop_back(); break;
      case json::parse_event_t::key: {
        const auto& key = value.get_ref<const std::string&>();
        require(keys.back().insert(key).second, what, " has the key ", printable(key), " twice");
        break;
      }
      default: break;
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::parse_error& error) {
    fail(ErrorKind::invalid_argument, what, " is not JSON: unexpected text at byte ", error.byte);
  } catch (const json::exception&) {
    fail(ErrorKind::invalid_argument, what, " is not JSON: a number is out of range");
  }
}

}  // namespace krait::io
