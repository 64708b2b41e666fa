#include "train/chart.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>

#include "krait/core/error.h"

namespace krait::report {
namespace {

constexpr int kWidth = 520;  // in pixels at natural size
constexpr int kWideWidth = 1064;
constexpr int kHeight = 260;
constexpr double kLeft = 62.0;
constexpr double kRight = 26.0;
constexpr double kTop = 10.0;
constexpr double kBottom = 30.0;
constexpr double kPointsPerPixel = 0.8;  // of a curve, at most
constexpr std::size_t kFewPoints = 60;   // up to here each has a mark
// An axis is logarithmic, where it may be, from this ratio of its values on, and if none is smaller than
// that.
constexpr double kFarApart = 50.0;
constexpr double kSmallest = 1e-30;

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void add(double x) {
    low = std::min(low, x);
    high = std::max(high, x);
  }
};

// From values to pixels.
struct Axis {
  double low;
  double high;
  double first;  // pixel of `low`
  double last;   // pixel of `high`
  bool logarithmic;

  [[nodiscard]] double operator()(double value) const {
    const double part =
        logarithmic ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
    return first + part * (last - first);
  }
};

// A little wider than the values, so that no curve runs along a border.
Axis make_axis(Range range, double first, double last, bool logarithmic, double margin) {
  if (logarithmic) {
    const double factor = std::pow(range.high / range.low, margin);
    return {range.low / factor, range.high * factor, first, last, true};
  }
  double room = margin * (range.high - range.low);
  if (range.high == range.low) room = range.high == 0.0 ? 1.0 : std::abs(range.high) * 0.1;
  return {range.low - room, range.high + room, first, last, false};
}

// Powers of ten, with 2 and 5 between them where there are few.
std::vector<double> logarithmic_ticks(double low, double high) {
  const bool few = std::log10(high / low) < 3.0;
  std::vector<double> marks;
  for (int power = static_cast<int>(std::floor(std::log10(low))); std::pow(10.0, power) <= high; ++power)
    for (const double digit : {1.0, 2.0, 5.0}) {
      const double mark = digit * std::pow(10.0, power);
      if (mark >= low && mark <= high && (few || digit == 1.0)) marks.push_back(mark);
    }
  return marks;
}

std::string pixel(double x) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), x, std::chars_format::fixed, 1).ptr;
  return {text.data(), end};
}

bool is_whole(double value) { return value == std::floor(value) && std::abs(value) < 1e15; }

// Whole numbers to the last digit, since steps are counted, others to the sixth.
std::string plain(double value) {
  std::array<char, 32> text{};
  char* const last = text.data() + text.size();
  const auto end = is_whole(value) ? std::to_chars(text.data(), last, static_cast<std::int64_t>(value))
                                   : std::to_chars(text.data(), last, value, std::chars_format::general, 6);
  return {text.data(), end.ptr};
}

std::string join(const std::vector<Point>& points, double Point::*member) {
  std::string list;
  for (const Point& p : points) list += (list.empty() ? "" : " ") + plain(p.*member);
  return list;
}

std::string draw_curve(const Curve& curve, const Axis& x, const Axis& y) {
  const auto limit = static_cast<std::size_t>(kPointsPerPixel * (x.last - x.first));
  const std::vector<Point> points = thinned(curve.points, limit);
  std::string at;
  for (const Point& p : points) at += (at.empty() ? "" : " ") + pixel(x(p.step)) + "," + pixel(y(p.value));
  std::string out = concat("<g class=\"curve ", curve.style, points.size() > limit / 2 ? " dense" : "",
                           "\" data-name=\"", escaped(curve.name), "\" data-x=\"", join(points, &Point::step),
                           "\" data-y=\"", join(points, &Point::value), "\"><polyline points=\"", at, "\"/>");
  if (points.size() <= kFewPoints)
    for (const Point& p : points)
      out += concat("<circle cx=\"", pixel(x(p.step)), "\" cy=\"", pixel(y(p.value)), "\" r=\"2.5\"/>");
  return out + "</g>\n";
}

std::string draw_grid(int width, const Axis& x, const Axis& y) {
  const double right = width - kRight;
  const double bottom = kHeight - kBottom;
  std::string out = "<g class=\"grid\">";
  for (const double mark : y.logarithmic ? logarithmic_ticks(y.low, y.high) : ticks(y.low, y.high, 5)) {
    const std::string at = pixel(y(mark));
    out += concat("<line x1=\"", pixel(kLeft), "\" x2=\"", pixel(right), "\" y1=\"", at, "\" y2=\"", at,
                  "\"/><text class=\"y\" x=\"", pixel(kLeft - 6.0), "\" y=\"", at, "\" dy=\"4\">",
                  number(mark), "</text>");
  }
  for (const double mark : ticks(x.low, x.high, width / 110))
    out += concat("<text class=\"x\" x=\"", pixel(x(mark)), "\" y=\"", pixel(bottom + 18.0), "\">",
                  number(mark), "</text>");
  return out + "</g>\n";
}

}  // namespace

std::string draw(const Chart& chart) {
  Range steps;
  Range values;
  for (const Curve& curve : chart.curves)
    for (const Point& p : curve.points) {
      steps.add(p.step);
      values.add(p.value);
    }
  if (steps.low > steps.high) return "";
  if (steps.low > 0.0 && steps.low < 0.1 * steps.high) steps.low = 0.0;  // most curves begin with a run
  const bool logarithmic =
      chart.logarithmic && values.low >= kSmallest && values.high / values.low >= kFarApart;
  const int width = chart.wide ? kWideWidth : kWidth;
  const Axis x = make_axis(steps, kLeft, width - kRight, false, 0.0);
  const Axis y = make_axis(values, kHeight - kBottom, kTop, logarithmic, 0.04);

  std::string legend;
  std::string curves;
  for (const Curve& curve : chart.curves) {
    if (curve.points.empty()) continue;
    legend += concat(" <span class=\"key ", curve.style, "\">", escaped(curve.name), "</span>");
    curves += draw_curve(curve, x, y);
  }
  return concat("<figure", chart.wide ? " class=\"wide\"" : "", ">\n<figcaption><b>", escaped(chart.title),
                "</b>", legend, "</figcaption>\n<svg class=\"chart\" viewBox=\"0 0 ", width, " ", kHeight,
                "\" role=\"img\" aria-label=\"", escaped(chart.title), " over steps\">\n",
                draw_grid(width, x, y), curves, "<line class=\"cursor\" y1=\"", pixel(kTop), "\" y2=\"",
                pixel(kHeight - kBottom), "\" visibility=\"hidden\"/>\n</svg>\n</figure>\n");
}

std::vector<Point> thinned(const std::vector<Point>& points, std::size_t limit) {
  if (points.size() <= limit) return points;
  const std::size_t stretches = std::max<std::size_t>(limit / 2, 1);
  std::vector<Point> kept;
  const auto keep = [&](std::size_t i) {
    if (kept.empty() || points[i].step > kept.back().step) kept.push_back(points[i]);
  };
  keep(0);
  for (std::size_t s = 0; s < stretches; ++s) {
    const std::size_t begin = points.size() * s / stretches;
    const std::size_t end = points.size() * (s + 1) / stretches;
    if (begin == end) continue;
    const auto by_value = [](const Point& a, const Point& b) { return a.value < b.value; };
    const auto [low, high] = std::minmax_element(points.begin() + static_cast<std::ptrdiff_t>(begin),
                                                 points.begin() + static_cast<std::ptrdiff_t>(end), by_value);
    keep(static_cast<std::size_t>(std::min(low, high) - points.begin()));
    keep(static_cast<std::size_t>(std::max(low, high) - points.begin()));
  }
  keep(points.size() - 1);
  return kept;
}

std::vector<Point> moving_average(const std::vector<Point>& points, std::size_t window) {
  std::vector<Point> means;
  means.reserve(points.size());
  // Sums of all values so far; in f64 their differences are as exact as any drawing.
  std::vector<double> sums{0.0};
  sums.reserve(points.size() + 1);
  for (const Point& p : points) sums.push_back(sums.back() + p.value);
  for (std::size_t i = 0; i < points.size(); ++i) {
    const std::size_t half = std::min(window / 2, i);
    const std::size_t begin = i - half;
    const std::size_t end = std::min(i + half + 1, points.size());
    means.push_back({points[i].step, (sums[end] - sums[begin]) / static_cast<double>(end - begin)});
  }
  return means;
}

std::vector<double> ticks(double low, double high, int count) {
  const double rough = (high - low) / count;
  std::vector<double> marks;
  if (!(rough > 0.0) || !std::isfinite(rough)) return marks;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10.0 * power;
  for (const double digit : {5.0, 2.0, 1.0})
    if (digit * power >= rough * 0.999) step = digit * power;
  // Counted, and not added up: beyond 2^53 a step may be no step.
  const double first = std::ceil(low / step);
  for (int i = 0; i <= count && (first + i) * step <= high; ++i) marks.push_back((first + i) * step);
  return marks;
}

std::string number(double value) {
  std::string text = plain(value);
  if (!is_whole(value)) return text;
  const std::ptrdiff_t first = value < 0.0 ? 1 : 0;
  for (auto at = static_cast<std::ptrdiff_t>(text.size()) - 3; at > first; at -= 3)
    text.insert(static_cast<std::size_t>(at), ",");
  return text;
}

std::string escaped(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out.push_back(c); break;
    }
  }
  return out;
}

}  // namespace krait::report
