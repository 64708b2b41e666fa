// Charts of curves over steps, as SVG.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "train/run_log.h"

namespace krait::report {

struct Curve {
  std::string name;
  std::string style;  // a class of the page's style sheet: its colour and width
  std::vector<Point> points;
};

struct Chart {
  std::string title;
  std::vector<Curve> curves;
  bool wide = false;         // as wide as the page
  bool logarithmic = false;  // where all values are positive and far apart
};

// A <figure>: title, legend and drawing. Each curve is a <g class="curve"> whose data-x and data-y have the
// steps and values of its points, for whoever looks closer. Without any point: "".
[[nodiscard]] std::string draw(const Chart& chart);

// At most about `limit` points with the same course: of each stretch the lowest and the highest, so that no
// spike is lost, and the first and last of all.
[[nodiscard]] std::vector<Point> thinned(const std::vector<Point>& points, std::size_t limit);

// The mean of each value and its neighbours, `window` (odd) together; at the beginning, where curves are
// steep, fewer on either side, and at the end fewer after it.
[[nodiscard]] std::vector<Point> moving_average(const std::vector<Point>& points, std::size_t window);

// Round numbers in [low, high], about `count` of them.
[[nodiscard]] std::vector<double> ticks(double low, double high, int count);

// "12,000" for whole numbers, else six significant digits: "0.0015", "2.5e-07".
[[nodiscard]] std::string number(double value);

// Text for HTML and XML, attributes included.
[[nodiscard]] std::string escaped(std::string_view text);

}  // namespace krait::report
