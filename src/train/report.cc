#include "train/report.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "krait/core/error.h"
#include "train/chart.h"
#include "train/report_page.h"

namespace krait::report {
namespace {

const std::vector<Point>& curve(const RunLog& log, const std::string& key) {
  static const std::vector<Point> kNone;
  const auto found = log.curves.find(key);
  return found == log.curves.end() ? kNone : found->second;
}

std::vector<Chart> charts_of(const RunLog& log) {
  const std::vector<Point>& loss = curve(log, "loss");
  constexpr std::size_t kWindows = 50;  // in a run
  const std::size_t window = std::min<std::size_t>(loss.size() / kWindows, 500) | 1U;
  Chart losses{.title = "Loss", .wide = true, .logarithmic = true};
  losses.curves.push_back({"training", window > 1 ? "c1 faint" : "c1", loss});
  if (window > 1)
    losses.curves.push_back({concat("mean of ", window, " lines"), "c1", moving_average(loss, window)});
  losses.curves.push_back({"validation", "c2", curve(log, "val_loss")});
  losses.curves.push_back({"validation, averaged weights", "c3", curve(log, "val_loss_average")});

  std::vector<Chart> charts{losses};
  charts.push_back(
      {.title = "Bits per byte",
       .curves = {{"validation", "c2", curve(log, "val_bits_per_byte")},
                  {"validation, averaged weights", "c3", curve(log, "val_bits_per_byte_average")}}});
  charts.push_back({.title = "Learning rate", .curves = {{"lr", "c1", curve(log, "lr")}}});
  charts.push_back({.title = "Gradient norm",
                    .curves = {{"grad_norm", "c1", curve(log, "grad_norm")}},
                    .logarithmic = true});
  charts.push_back({.title = "Tokens per second",
                    .curves = {{"tokens_per_second", "c4", curve(log, "tokens_per_second")}}});
  if (!curve(log, "skipped").empty() && curve(log, "skipped").back().value > 0.0)
    charts.push_back({.title = "Skipped steps", .curves = {{"skipped", "c2", curve(log, "skipped")}}});

  const std::set<std::string> known{
      "loss",      "val_loss",          "val_loss_average",          "val_bits_per_byte", "lr",
      "grad_norm", "tokens_per_second", "val_bits_per_byte_average", "skipped",           "tokens",
      "seconds"};
  for (const auto& [key, points] : log.curves)
    if (!known.contains(key)) charts.push_back({.title = key, .curves = {{key, "c3", points}}});
  return charts;
}

std::string duration(double seconds) {
  const auto whole = static_cast<std::int64_t>(seconds);
  if (whole >= 3600) return concat(whole / 3600, " h ", whole % 3600 / 60, " min");
  if (whole >= 60) return concat(whole / 60, " min ", whole % 60, " s");
  return concat(number(seconds), " s");
}

// The run in a few numbers.
std::string summary_of(const RunLog& log) {
  std::string out;
  const auto add = [&](std::string_view name, const std::string& value) {
    out += concat("<div><dt>", name, "</dt><dd>", escaped(value), "</dd></div>\n");
  };
  double last_step = 0.0;
  for (const auto& [key, points] : log.curves) last_step = std::max(last_step, points.back().step);
  add("steps", number(last_step));
  const auto add_last = [&](std::string_view name, const std::string& key, const auto& show) {
    if (!curve(log, key).empty()) add(name, show(curve(log, key).back().value));
  };
  add_last("loss", "loss", number);
  for (const auto& [name, key] : {std::pair{"best validation loss", "val_loss"},
                                  std::pair{"best bits per byte", "val_bits_per_byte"}}) {
    const std::vector<Point>& points = curve(log, key);
    if (points.empty()) continue;
    const auto best = std::min_element(points.begin(), points.end(),
                                       [](const Point& a, const Point& b) { return a.value < b.value; });
    add(name, concat(number(best->value), " at step ", number(best->step)));
  }
  add_last("tokens", "tokens", number);
  add_last("time", "seconds", duration);
  if (!curve(log, "skipped").empty() && curve(log, "skipped").back().value > 0.0)
    add_last("skipped steps", "skipped", number);
  return out;
}

}  // namespace

std::string render(const RunLog& log) {
  std::string page = concat(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta name=\"generator\" content=\"krait report\">\n"
      // The page asks for nothing, whatever its texts say.
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
      "script-src 'unsafe-inline'\">\n<title>",
      escaped(log.name), "</title>\n<style>", kStyle, "</style>\n</head>\n<body>\n<h1>", escaped(log.name),
      "</h1>\n");
  if (log.curves.empty())
    page += "<p>No step has been logged yet.</p>\n";
  else
    page += concat("<dl>\n", summary_of(log), "</dl>\n<div class=\"charts\">\n");
  for (const Chart& chart : charts_of(log)) page += draw(chart);
  if (!log.curves.empty()) page += "</div>\n";

  if (!log.settings.empty()) {
    page += "<h2>Settings</h2>\n<div class=\"settings\"><table>\n";
    for (const auto& [name, value] : log.settings)
      page += concat("<tr><th>", escaped(name), "</th><td>", escaped(value), "</td></tr>\n");
    page += "</table></div>\n";
  }

  if (!log.samples.empty()) page += "<h2>Samples</h2>\n";
  // The newest first, and open.
  for (auto sample = log.samples.rbegin(); sample != log.samples.rend(); ++sample)
    page += concat("<details", sample == log.samples.rbegin() ? " open" : "", "><summary>step ",
                   number(sample->step), "</summary><pre>\n", escaped(sample->text), "</pre></details>\n");
  return page + concat("<script>", kScript, "</script>\n</body>\n</html>\n");
}

}  // namespace krait::report
