// The learning rate over the steps of a run.
#pragma once

#include <cstdint>
#include <string_view>

namespace krait {

enum class Schedule : std::uint8_t {
  constant,  // lr
  linear,    // from lr to min_lr along a line
  cosine,    // from lr to min_lr along half a cosine (Loshchilov and Hutter 2017, without restarts)
  wsd,       // warmup, stable, decay (Hu et al. 2024): lr, then along a line to min_lr over the last `decay`
};
[[nodiscard]] std::string_view name_of(Schedule schedule);

struct ScheduleArgs {
  Schedule schedule = Schedule::constant;
  std::int64_t steps = 1;   // of the whole run
  std::int64_t warmup = 0;  // steps in which the rate rises to lr
  std::int64_t decay = 0;   // of wsd: steps in which it falls
  double lr = 1e-3;
  double min_lr = 0.0;
};

// The rate of step `step`, counted from 0. While step < warmup it is lr (step + 1) / warmup. Then it falls
// with t = (step - begin) / (steps - begin), where begin is the first step of the fall (warmup, or
// steps - decay for wsd): the first step after the warmup has lr, and min_lr would be reached one step
// after the last. Steps beyond the run's end have min_lr (constant: lr).
[[nodiscard]] double learning_rate(const ScheduleArgs& args, std::int64_t step);

}  // namespace krait
