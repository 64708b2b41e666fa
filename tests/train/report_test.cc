#include "train/report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "io/scratch.h"
#include "train/chart.h"

namespace krait::report {
namespace {

// Fails where a tag is not closed in order, an attribute has no quotes or a "<" or "&" stands for itself.
void expect_well_formed(std::string_view page) {
  const std::set<std::string, std::less<>> kVoid{"meta", "br", "!DOCTYPE"};
  std::vector<std::string> open;
  const auto expect_text = [&](std::string_view text) {
    EXPECT_EQ(text.find('>'), std::string_view::npos) << text;
    for (std::size_t i = text.find('&'); i != std::string_view::npos; i = text.find('&', i + 1)) {
      const std::string_view entity = text.substr(i, text.find(';', i) - i + 1);
      EXPECT_TRUE((std::set<std::string_view>{"&amp;", "&lt;", "&gt;", "&quot;", "&#39;"}).contains(entity))
          << text.substr(i, 20);
    }
  };
  while (!page.empty()) {
    const std::size_t begin = page.find('<');
    expect_text(page.substr(0, begin));
    if (begin == std::string_view::npos) break;
    page.remove_prefix(begin + 1);
    // Up to the ">" that is in no quotes.
    std::size_t end = 0;
    for (bool quoted = false; end < page.size() && (quoted || page[end] != '>'); ++end) {
      quoted ^= page[end] == '"';
      ASSERT_NE(page[end], '<') << page.substr(0, 80);
    }
    ASSERT_LT(end, page.size());
    std::string_view tag = page.substr(0, end);
    page.remove_prefix(end + 1);
    const std::string name(tag.substr(0, tag.find_first_of(" /", 1)));
    if (name.starts_with("/")) {
      ASSERT_FALSE(open.empty()) << name;
      EXPECT_EQ(open.back(), name.substr(1));
      open.pop_back();
      continue;
    }
    for (std::size_t i = tag.find('='); i != std::string_view::npos; i = tag.find('=', i)) {
      ASSERT_EQ(tag.substr(i + 1, 1), "\"") << tag;
      const std::size_t last = tag.find('"', i + 2);
      ASSERT_NE(last, std::string_view::npos) << tag;
      expect_text(tag.substr(i + 2, last - i - 2));
      i = last;
    }
    if (tag.ends_with("/") || kVoid.contains(name)) continue;
    open.push_back(name);
    if (name == "style" || name == "script") {
      const std::size_t close = page.find("</" + name + ">");
      ASSERT_NE(close, std::string_view::npos) << name;
      page.remove_prefix(close);
    }
  }
  EXPECT_TRUE(open.empty()) << "never closed: " << open.back();
}

std::size_t count(std::string_view text, std::string_view part) {
  std::size_t found = 0;
  for (std::size_t i = text.find(part); i != std::string_view::npos; i = text.find(part, i + 1)) ++found;
  return found;
}

void expect_part(std::string_view text, std::string_view part) {
  EXPECT_NE(text.find(part), std::string_view::npos) << part;
}

std::vector<double> steps_of(const std::vector<Point>& points) {
  std::vector<double> steps;
  for (const Point& p : points) steps.push_back(p.step);
  return steps;
}

std::vector<double> values_of(const std::vector<Point>& points) {
  std::vector<double> values;
  for (const Point& p : points) values.push_back(p.value);
  return values;
}

constexpr std::string_view kMetrics =
    R"({"step":10,"loss":3.5,"grad_norm":0.8,"lr":0.001,"tokens":1000,"seconds":2.5,"tokens_per_second":400,"skipped":0}
{"step":20,"loss":3.25,"grad_norm":0.5,"lr":0.0005,"tokens":12000,"seconds":3725.0,"tokens_per_second":401.5,"skipped":0}
{"step":20,"val_loss":3.125,"val_bits_per_byte":4.5,"best":true,"seconds":1.5}
{"step":30,"loss":3.0,"grad_norm":0.25,"lr":0.0,"tokens":12345,"seconds":3730.5,"tokens_per_second":402,"skipped":0}
{"step":30,"val_loss":3.375,"val_bits_per_byte":4.75,"best":false,"seconds":1.5}
)";

TEST(Metrics, CurvesByKey) {
  const auto curves = parse_metrics(kMetrics, "m");
  EXPECT_EQ(values_of(curves.at("loss")), (std::vector<double>{3.5, 3.25, 3.0}));
  EXPECT_EQ(steps_of(curves.at("loss")), (std::vector<double>{10, 20, 30}));
  EXPECT_EQ(values_of(curves.at("val_bits_per_byte")), (std::vector<double>{4.5, 4.75}));
  EXPECT_EQ(values_of(curves.at("seconds")), (std::vector<double>{2.5, 3725.0, 3730.5}));
  EXPECT_FALSE(curves.contains("step"));
  EXPECT_FALSE(curves.contains("best"));
}

TEST(Metrics, TheLastLineMayBeCutOff) {
  const std::string first = "{\"step\":1,\"loss\":2}\n";
  const std::string second = "{\"step\":2,\"loss\":1.5}";
  for (std::size_t length = 0; length < second.size(); ++length) {
    SCOPED_TRACE(length);
    const auto curves = parse_metrics(first + second.substr(0, length), "m");
    EXPECT_EQ(values_of(curves.at("loss")), (std::vector<double>{2.0}));
  }
  EXPECT_EQ(values_of(parse_metrics(first + second, "m").at("loss")), (std::vector<double>{2.0, 1.5}));
  EXPECT_TRUE(parse_metrics("", "m").empty());
  EXPECT_TRUE(parse_metrics("{\"st", "m").empty());
}

TEST(Metrics, NamesTheLineThatIsWrong) {
  const std::string good = "{\"step\":1,\"loss\":2}\n\n";
  EXPECT_MESSAGE(parse_metrics(good + "{\"step\":2,\n", "run/m.jsonl"), "run/m.jsonl: line 3: not JSON");
  EXPECT_MESSAGE(parse_metrics(good + "{\"step\":2,\n" + good, "m"), "m: line 3: not JSON");
  EXPECT_MESSAGE(parse_metrics(good + "[1]\n", "m"), "m: line 3 is array, expected an object");
  EXPECT_MESSAGE(parse_metrics("{\"loss\":1}\n", "m"), "m: line 1 has no step");
  EXPECT_MESSAGE(parse_metrics("{\"step\":\"1\"}", "m"), "m: line 1 has no step");
  EXPECT_MESSAGE(parse_samples("{\"step\":1}\n", "s"), "s: line 1 has no text");
}

TEST(Metrics, WhatIsNoNumberIsLeftOut) {
  const auto curves = parse_metrics(
      "{\"step\":1,\"loss\":null}\n{\"step\":2,\"loss\":NaN}\n{\"step\":3,\"loss\":-Infinity}\n"
      "{\"step\":4,\"loss\":1e999}\n{\"step\":5,\"loss\":\"2\"}\n{\"step\":6,\"loss\":2}\n",
      "m");
  EXPECT_EQ(steps_of(curves.at("loss")), (std::vector<double>{6}));
}

// A run that was killed at step 4 and resumed from step 2.
TEST(Metrics, LaterLinesOfAStepCount) {
  const auto curves = parse_metrics(
      "{\"step\":1,\"loss\":9}\n{\"step\":2,\"loss\":8}\n{\"step\":3,\"loss\":7}\n{\"step\":4,\"loss\":6}\n"
      "{\"step\":3,\"loss\":5}\n{\"step\":4,\"loss\":4}\n{\"step\":5,\"loss\":3}\n",
      "m");
  EXPECT_EQ(steps_of(curves.at("loss")), (std::vector<double>{1, 2, 3, 4, 5}));
  EXPECT_EQ(values_of(curves.at("loss")), (std::vector<double>{9, 8, 5, 4, 3}));
}

TEST(Settings, InTheOrderOfTheFile) {
  const auto settings = parse_settings(
      R"({"zeta": 1, "alpha": "text", "betas": [0.9, 0.95], "nested": {"b": true, "a": null}, "prompt": "\n", "none": ""})",
      "s");
  const std::vector<std::pair<std::string, std::string>> expected{
      {"zeta", "1"},        {"alpha", "text"},     {"betas", "0.9, 0.95"}, {"nested.b", "true"},
      {"nested.a", "null"}, {"prompt", "\"\\n\""}, {"none", "\"\""}};
  EXPECT_EQ(settings, expected);
  EXPECT_MESSAGE(parse_settings("{\"a\":", "run/settings.json"), "run/settings.json is not JSON");
  EXPECT_MESSAGE(parse_settings("[]", "s"), "s is array, expected an object");
}

TEST(Thinned, KeepsSpikesAndEnds) {
  std::vector<Point> points;
  for (int i = 0; i < 100'000; ++i) points.push_back({i * 1.0, std::sin(i * 0.001)});
  points[31'337].value = 50.0;
  points[77'777].value = -50.0;
  const auto kept = thinned(points, 400);
  EXPECT_LE(kept.size(), 402U);
  EXPECT_GE(kept.size(), 300U);
  EXPECT_EQ(kept.front().step, 0.0);
  EXPECT_EQ(kept.back().step, 99'999.0);
  const auto has = [&](double step, double value) {
    return std::any_of(kept.begin(), kept.end(),
                       [&](const Point& p) { return p.step == step && p.value == value; });
  };
  EXPECT_TRUE(has(31'337, 50.0));
  EXPECT_TRUE(has(77'777, -50.0));
  for (std::size_t i = 1; i < kept.size(); ++i) ASSERT_LT(kept[i - 1].step, kept[i].step);
  EXPECT_EQ(thinned({{1, 2}, {2, 3}}, 2).size(), 2U);
  EXPECT_TRUE(thinned({}, 10).empty());
}

TEST(MovingAverage, ByHand) {
  const std::vector<Point> points{{1, 8}, {2, 4}, {3, 6}, {4, 2}, {9, 0}};
  EXPECT_EQ(values_of(moving_average(points, 3)), (std::vector<double>{8, 6, 4, 8.0 / 3.0, 1}));
  EXPECT_EQ(steps_of(moving_average(points, 3)), steps_of(points));
  EXPECT_EQ(values_of(moving_average(points, 1)), values_of(points));
  EXPECT_EQ(values_of(moving_average(points, 99)).front(), 8.0);
}

TEST(Ticks, AreRound) {
  const auto expect_ticks = [](double low, double high, const std::vector<double>& expected) {
    const auto found = ticks(low, high, 5);
    ASSERT_EQ(found.size(), expected.size()) << low << " to " << high;
    for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-12 * (high - low));
  };
  expect_ticks(0.0, 10.0, {0, 2, 4, 6, 8, 10});
  expect_ticks(1.3, 3.9, {2, 3});
  expect_ticks(1.3, 3.6, {1.5, 2, 2.5, 3, 3.5});
  expect_ticks(0.00031, 0.00094, {0.0004, 0.0006, 0.0008});
  expect_ticks(-3.0, 12.0, {0, 5, 10});
  expect_ticks(5.0, 5.0, {});
  EXPECT_LE(ticks(1e18, 1e18 + 2048, 5).size(), 6U);
  EXPECT_TRUE(ticks(-1e308, 1e308, 5).empty());
}

TEST(Number, ForPeople) {
  EXPECT_EQ(number(0.0), "0");
  EXPECT_EQ(number(999.0), "999");
  EXPECT_EQ(number(12000.0), "12,000");
  EXPECT_EQ(number(-1234567.0), "-1,234,567");
  EXPECT_EQ(number(-123.0), "-123");
  EXPECT_EQ(number(0.0015), "0.0015");
  EXPECT_EQ(number(3.14159265), "3.14159");
  EXPECT_EQ(number(2.5e-7), "2.5e-07");
}

TEST(Draw, Coordinates) {
  const std::string svg = draw({.title = "T", .curves = {{"c", "c1", {{0, 0}, {50, 1}, {100, 2}}}}});
  // 520 x 260 with margins of 62, 26, 10 and 30; 4 parts in 108 of the height stay free on either side.
  expect_part(svg, "<polyline points=\"62.0,221.9 278.0,120.0 494.0,18.1\"/>");
  expect_part(svg, "data-x=\"0 50 100\" data-y=\"0 1 2\"");
  EXPECT_EQ(count(svg, "<circle"), 3U);
  expect_well_formed(svg);
}

TEST(Draw, LogarithmicWhereValuesAreFarApart) {
  const auto middle = [](double high, bool logarithmic) {
    const std::string svg = draw({.title = "T",
                                  .curves = {{"c", "c1", {{0, 1}, {50, std::sqrt(high)}, {100, high}}}},
                                  .logarithmic = logarithmic});
    return svg.find(" 278.0,120.0 ") != std::string::npos;  // the geometric mean is in the middle
  };
  EXPECT_TRUE(middle(100.0, true));
  EXPECT_FALSE(middle(100.0, false));
  EXPECT_FALSE(middle(40.0, true));
}

TEST(Draw, AnyNumbers) {
  for (const std::vector<Point>& points : {std::vector<Point>{{0, 0}},
                                           {{5, 5}},
                                           {{1, -3}},
                                           {{1, 2}, {2, 2}},
                                           {{1, -1e99}, {1e15, 1e99}},
                                           {{1, 1e-300}, {2, 1e99}},
                                           {{1, 1e-320}, {2, 2e-320}},
                                           {{-5, 1}, {7, 1e-9}},
                                           {{1e15, 1.0}, {1e15 + 1, 1.0 + 1e-15}}})
    for (const bool logarithmic : {false, true}) {
      const std::string svg =
          draw({.title = "T", .curves = {{"c", "c1", points}}, .logarithmic = logarithmic});
      SCOPED_TRACE(svg);
      expect_well_formed(svg);
      EXPECT_EQ(svg.find("nan"), std::string::npos);
      EXPECT_EQ(svg.find("inf"), std::string::npos);
    }
  EXPECT_EQ(draw({.title = "T", .curves = {{"c", "c1", {}}}}), "");
}

TEST(Render, ShowsARun) {
  RunLog log{.name = "run one", .curves = parse_metrics(kMetrics, "m")};
  log.settings = {{"lr", "0.001"}, {"schedule", "cosine"}};
  log.samples = {{10, "\nfirst"}, {30, "second"}};
  const std::string page = render(log);
  expect_well_formed(page);
  expect_part(page, "<title>run one</title>");
  for (const char* title : {"Loss", "Bits per byte", "Learning rate", "Gradient norm", "Tokens per second"})
    expect_part(page, concat("<figcaption><b>", title, "</b>"));
  EXPECT_EQ(count(page, "<svg "), 5U);  // nothing was skipped, and no other key was logged
  expect_part(page, "data-name=\"training\" data-x=\"10 20 30\" data-y=\"3.5 3.25 3\"");
  expect_part(page, "data-name=\"validation\" data-x=\"20 30\" data-y=\"3.125 3.375\"");
  expect_part(page, "<dt>steps</dt><dd>30</dd>");
  expect_part(page, "<dt>best validation loss</dt><dd>3.125 at step 20</dd>");
  expect_part(page, "<dt>tokens</dt><dd>12,345</dd>");
  expect_part(page, "<dt>time</dt><dd>1 h 2 min</dd>");
  expect_part(page, "<tr><th>schedule</th><td>cosine</td></tr>");
  // The newest sample first; the line break at its beginning is the one that HTML drops.
  expect_part(page, "<details open><summary>step 30</summary><pre>\nsecond</pre>");
  expect_part(page, "<details><summary>step 10</summary><pre>\n\nfirst</pre>");
  EXPECT_LT(page.find("second"), page.find("first"));
}

TEST(Render, KeysOfOthersAndSkippedSteps) {
  const std::string page = render(
      {.name = "r",
       .curves = parse_metrics("{\"step\":1,\"loss\":2,\"skipped\":3,\"router_entropy\":0.5}\n", "m")});
  expect_part(page, "<b>router_entropy</b>");
  expect_part(page, "<b>Skipped steps</b>");
  expect_part(page, "<dt>skipped steps</dt><dd>3</dd>");
}

TEST(Render, NothingBreaksOut) {
  const std::string evil = "</pre></script>\"'&<script>alert(1)</script>";
  RunLog log{.name = evil, .curves = {{evil, {{1, 2}, {2, 3}}}}};
  log.settings = {{evil, evil}};
  log.samples = {{1, evil}};
  const std::string page = render(log);
  expect_well_formed(page);
  EXPECT_EQ(count(page, "<script>"), 1U);
  // Title and heading; of the chart its title, label, legend and curve; two of the settings; the sample.
  EXPECT_EQ(count(page, "&lt;script&gt;alert(1)"), 9U);
}

TEST(Render, AsksForNothing) {
  const std::string page = render({.name = "r", .curves = parse_metrics(kMetrics, "m")});
  for (const char* part : {"http:", "https:", "src=", "href=", "url(", "import", "fetch"})
    EXPECT_EQ(page.find(part), std::string::npos) << part;
  expect_part(page, "default-src 'none'");
}

TEST(Render, RunsOfAnyLength) {
  const std::string empty = render({.name = "r"});
  expect_well_formed(empty);
  expect_part(empty, "No step has been logged yet.");

  RunLog log{.name = "long"};
  for (int step = 1; step <= 50'000; ++step) {
    log.curves["loss"].push_back({step * 1.0, 2.0 + std::cos(step * 0.1)});
    log.curves["grad_norm"].push_back({step * 1.0, 1.0 + std::sin(step * 0.7)});
  }
  const std::string page = render(log);
  expect_well_formed(page);
  expect_part(page, "mean of 501 lines");
  EXPECT_LT(page.size(), 120'000U);
  EXPECT_EQ(page.find("<circle"), std::string::npos);
}

TEST(ReadRunLog, Directories) {
  const io::Scratch scratch;
  const auto run = scratch / "my run";
  EXPECT_MESSAGE(read_run_log(run), "my run: no such directory");
  std::filesystem::create_directory(run);
  EXPECT_MESSAGE(read_run_log(run),
                 "my run: holds no metrics.jsonl, expected the directory of a training run");
  scratch.put("my run/metrics.jsonl", kMetrics);
  RunLog log = read_run_log(run / "");
  EXPECT_EQ(log.name, "my run");
  EXPECT_EQ(log.curves.at("loss").size(), 3U);
  EXPECT_TRUE(log.settings.empty() && log.samples.empty());

  scratch.put("my run/settings.json", "{\"lr\": 0.5}");
  scratch.put("my run/samples.jsonl",
              "{\"step\":2,\"text\":\"b\"}\n{\"step\":1,\"text\":\"a\"}\n{\"step\":3,");
  log = read_run_log(run);
  EXPECT_EQ(log.settings.at(0).second, "0.5");
  ASSERT_EQ(log.samples.size(), 2U);
  EXPECT_EQ(log.samples[0].text, "a");

  scratch.put("my run/settings.json", "{");
  EXPECT_MESSAGE(read_run_log(run), "my run/settings.json is not JSON");
}

}  // namespace
}  // namespace krait::report
