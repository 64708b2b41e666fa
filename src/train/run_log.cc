#include "train/run_log.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <sstream>

#include "io/json.h"
#include "io/system_error.h"
#include "krait/core/error.h"
#include "models/json.h"

namespace krait::report {
namespace fs = std::filesystem;
namespace {

using nlohmann::json;

constexpr double kLargest = 1e100;  // as good as infinite

std::string read_text(const fs::path& path) {
  require(!fs::is_directory(path), path.string(), ": is a directory, expected a file");
  std::ifstream file(path, std::ios::binary);
  if (!file) io::fail_errno(errno, path, "cannot be opened");
  std::ostringstream text;
  if (file.peek() != std::ifstream::traits_type::eof()) text << file.rdbuf();
  if (file.bad() || text.bad()) fail(ErrorKind::io, path.string(), ": cannot be read");
  return text.str();
}

// Calls use(object, where) for each line, where `where` is "name: line 3".
void for_each_object(std::string_view lines, const std::string& name,
                     const std::function<void(const json&, const std::string&)>& use) {
  for (std::int64_t number = 1; !lines.empty(); ++number) {
    const std::size_t end = lines.find('\n');
    const bool whole = end != std::string_view::npos;
    const std::string_view line = lines.substr(0, end);
    lines.remove_prefix(whole ? end + 1 : lines.size());
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string where = concat(name, ": line ", number);
    json object;
    try {
      object = parse_json(line, where);
    } catch (const Error&) {
      if (!whole) return;
      throw;
    }
    require(object.is_object(), where, " is ", object.type_name(), ", expected an object");
    const auto step = object.find("step");
    require(step != object.end() && step->is_number(), where, " has no step, expected {\"step\": N, ...}");
    use(object, where);
  }
}

// In the order of steps, and of several items with one step the last.
template <typename Item>
void put_in_order(std::vector<Item>& items) {
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.step < b.step; });
  std::size_t kept = 0;
  for (std::size_t i = 0; i < items.size(); ++i)
    if (i + 1 == items.size() || items[i + 1].step > items[i].step) {
      if (kept != i) items[kept] = std::move(items[i]);
      ++kept;
    }
  items.resize(kept);
}

// Texts as they are where one sees what they are.
std::string shown(const nlohmann::ordered_json& value) {
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    const bool plain = !text.empty() && text.front() != ' ' && text.back() != ' ' &&
                       std::all_of(text.begin(), text.end(),
                                   [](char c) { return static_cast<unsigned char>(c) >= ' ' && c != 0x7F; });
    return plain ? text : value.dump();
  }
  if (value.is_array()) {
    std::string list;
    for (const auto& item : value) list += (list.empty() ? "" : ", ") + shown(item);
    return list;
  }
  return value.dump();
}

void collect_settings(const nlohmann::ordered_json& object, const std::string& prefix,
                      std::vector<std::pair<std::string, std::string>>& settings) {
  for (const auto& [key, value] : object.items()) {
    if (value.is_object())
      collect_settings(value, prefix + key + ".", settings);
    else
      settings.emplace_back(prefix + key, shown(value));
  }
}

}  // namespace

std::map<std::string, std::vector<Point>> parse_metrics(std::string_view lines, const std::string& name) {
  std::map<std::string, std::vector<Point>> curves;
  for_each_object(lines, name, [&](const json& object, const std::string&) {
    const double step = object["step"].get<double>();
    const bool of_step = object.contains("loss");
    for (const auto& [key, value] : object.items()) {
      if (key == "step" || !value.is_number() || !(std::abs(value.get<double>()) < kLargest)) continue;
      // The time of a step is that since the beginning; of an evaluation it may be its own.
      if (key == "seconds" && !of_step) continue;
      curves[key].push_back({step, value.get<double>()});
    }
  });
  for (auto& [key, points] : curves) put_in_order(points);
  return curves;
}

std::vector<Sample> parse_samples(std::string_view lines, const std::string& name) {
  std::vector<Sample> samples;
  for_each_object(lines, name, [&](const json& object, const std::string& where) {
    const auto text = object.find("text");
    require(text != object.end() && text->is_string(), where,
            " has no text, expected {\"step\": N, \"text\": \"...\"}");
    samples.push_back({object["step"].get<double>(), text->get<std::string>()});
  });
  put_in_order(samples);
  return samples;
}

std::vector<std::pair<std::string, std::string>> parse_settings(std::string_view text,
                                                                const std::string& name) {
  constexpr int kMaxDepth = 16;
  const json checked = io::parse_json(text, kMaxDepth, name);
  require(checked.is_object(), name, " is ", checked.type_name(), ", expected an object");
  std::vector<std::pair<std::string, std::string>> settings;
  // Once more, for the order of the file.
  collect_settings(nlohmann::ordered_json::parse(text), "", settings);
  return settings;
}

RunLog read_run_log(const fs::path& directory) {
  if (!fs::exists(directory)) fail(ErrorKind::not_found, directory.string(), ": no such directory");
  const fs::path metrics = directory / "metrics.jsonl";
  const fs::path settings = directory / "settings.json";
  const fs::path samples = directory / "samples.jsonl";
  if (!fs::exists(metrics))
    fail(ErrorKind::not_found, directory.string(),
         ": holds no metrics.jsonl, expected the directory of a training run");
  RunLog log;
  log.name = fs::canonical(directory).filename().string();
  log.curves = parse_metrics(read_text(metrics), metrics.string());
  if (fs::exists(settings)) log.settings = parse_settings(read_text(settings), settings.string());
  if (fs::exists(samples)) log.samples = parse_samples(read_text(samples), samples.string());
  return log;
}

}  // namespace krait::report
