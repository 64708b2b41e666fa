#include "krait/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace krait {
namespace {

// How much of lr - min_lr is left.
double remaining(Schedule schedule, double t) {
  switch (schedule) {
    case Schedule::constant: return 1.0;
    case Schedule::linear:
    case Schedule::wsd: return 1.0 - t;
    case Schedule::cosine: return 0.5 * (1.0 + std::cos(std::numbers::pi * t));
  }
  return 1.0;
}

}  // namespace

std::string_view name_of(Schedule schedule) {
  switch (schedule) {
    case Schedule::constant: return "constant";
    case Schedule::linear: return "linear";
    case Schedule::cosine: return "cosine";
    case Schedule::wsd: return "wsd";
  }
  return "";
}

double learning_rate(const ScheduleArgs& args, std::int64_t step) {
  if (args.schedule == Schedule::constant && step >= args.warmup) return args.lr;
  if (step < args.warmup) return args.lr * static_cast<double>(step + 1) / static_cast<double>(args.warmup);
  const std::int64_t begin =
      args.schedule == Schedule::wsd ? std::max(args.warmup, args.steps - args.decay) : args.warmup;
  if (step < begin) return args.lr;
  const double length = static_cast<double>(std::max<std::int64_t>(args.steps - begin, 1));
  const double t = std::min(1.0, static_cast<double>(step - begin) / length);
  return args.min_lr + (args.lr - args.min_lr) * remaining(args.schedule, t);
}

}  // namespace krait
