#include "train_progress.h"

#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <iomanip>
#include <sstream>

#include "krait/core/error.h"
#include "terminal.h"

namespace krait::cli {
namespace {

constexpr std::chrono::milliseconds kRedraw{100};
// Without a terminal: so many lines in a run at even intervals, and one more wherever there was none for
// long.
constexpr std::int64_t kLines = 20;
constexpr std::chrono::seconds kLine{10};

// "1:02:03" or "2:03"
std::string clock_text(double seconds) {
  const auto total = static_cast<std::int64_t>(std::ceil(seconds));
  std::ostringstream text;
  text << std::setfill('0');
  if (total >= 3600) text << total / 3600 << ':' << std::setw(2);
  text << total / 60 % 60 << ':' << std::setw(2) << total % 60;
  return text.str();
}

std::string fixed(double value, int digits) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

// 20 cells.
std::string bar(double share) {
  constexpr int kCells = 20;
  const int full = static_cast<int>(share * kCells);
  std::string text = "[";
  for (int i = 0; i < kCells; ++i) text += i < full ? '=' : i == full ? '>' : ' ';
  return text + "]";
}

}  // namespace

TrainProgress::TrainProgress() : terminal_(::isatty(STDERR_FILENO) == 1) {}
TrainProgress::~TrainProgress() { clear(); }

void TrainProgress::clear() {
  if (drawn_) std::fputs("\r\x1b[K", stderr);
  drawn_ = false;
}

void TrainProgress::line(std::string_view text) {
  clear();
  print(concat(text, "\n"));
  flush();
}

void TrainProgress::start(const RunStart& start) {
  start_ = start;
  began_ = last_ = Clock::now();
  std::string text = concat(start.parameters, " parameters, ", start.data_tokens, " tokens in ",
                            start.batches_per_epoch, " batches, ", start.steps, " steps");
  if (start.first_step > 0) text += concat(", going on after step ", start.first_step);
  line(text);
}

std::string TrainProgress::describe(const StepReport& report) const {
  const double done = static_cast<double>(report.step - start_.first_step);
  const double seconds = std::chrono::duration<double>(Clock::now() - began_).count();
  const double left = seconds / done * static_cast<double>(start_.steps - report.step);
  return concat("step ", report.step, "/", start_.steps, "  loss ", fixed(report.loss, 4), "  ",
                fixed(report.tokens_per_second, 0), " tokens/s  ", clock_text(left), " left");
}

void TrainProgress::step(const StepReport& report) {
  const auto now = Clock::now();
  const auto lines_by = [&](std::int64_t step) { return step * kLines / start_.steps; };
  const bool due = terminal_ ? now - last_ >= kRedraw
                             : now - last_ >= kLine || lines_by(report.step) != lines_by(report.step - 1);
  if (!due) return;
  last_ = now;
  if (!terminal_) return line(describe(report));
  const double share = static_cast<double>(report.step) / static_cast<double>(start_.steps);
  std::fputs(concat("\r", bar(share), " ", describe(report), "\x1b[K").c_str(), stderr);
  drawn_ = true;
}

void TrainProgress::evaluation(const EvaluationReport& report) {
  const auto measure = [](double loss, const std::optional<double>& bits) {
    return fixed(loss, 4) + (bits ? " (" + fixed(*bits, 4) + " bits per byte)" : "");
  };
  std::string text =
      concat("step ", report.step, "  validation loss ", measure(report.loss, report.bits_per_byte));
  if (report.average_loss)
    text += "  averaged weights " + measure(*report.average_loss, report.average_bits_per_byte);
  if (report.best) text += "  best";
  line(text);
}

void TrainProgress::sample(const SampleReport& report) {
  line(concat("step ", report.step, "  sample:\n", report.text));
}

void TrainProgress::checkpoint(const std::filesystem::path& path) { line(concat("saved ", path.string())); }

void TrainProgress::end(const TrainResult& result, const std::string& directory) {
  const std::string best =
      result.best_step >= 0
          ? concat(", best validation loss ", fixed(result.best_loss, 4), " at step ", result.best_step)
          : "";
  switch (result.end) {
    case RunEnd::finished:
      return line(concat("done: ", result.steps, " steps in ", clock_text(result.seconds), best,
                         "; the model is in ", directory));
    case RunEnd::stopped_early:
      return line(concat("stopped early after ", result.steps, " steps in ", clock_text(result.seconds), best,
                         "; the model is in ", directory));
    case RunEnd::already_finished:
      return line(
          concat("finished before, after ", result.steps, " steps", best, "; the model is in ", directory));
    case RunEnd::interrupted:
      return line(concat("interrupted after ", result.steps, " steps; --resume goes on"));
  }
}

}  // namespace krait::cli
