// causal_conv1d as it is defined: every tensor in f64, plain loops.
#include <cmath>
#include <vector>

#include "ops/causal_conv1d/conv.h"

namespace krait::conv_detail {
namespace {

double activate(double value, Activation activation) {
  return activation == Activation::silu ? value / (1.0 + std::exp(-value)) : value;
}

// A contiguous f64 copy, or nothing.
std::vector<double> values_of(const Tensor& t) {
  if (!t) return {};
  const Tensor copy = t.to(DType::f64).contiguous();
  return {copy.data<double>(), copy.data<double>() + copy.numel()};
}

// bias + sum_k weight_k taps_k, activated; K taps, the oldest first.
double output(const double* weight, std::int64_t kernel, double bias, const double* taps,
              Activation activation) {
  double sum = bias;
  for (std::int64_t k = 0; k < kernel; ++k) sum += weight[k] * taps[k];
  return activate(sum, activation);
}

}  // namespace

void forward_reference(Context&, const Forward& f) {
  const std::int64_t channels = f.x.size(1);
  const std::int64_t length = f.x.size(2);
  const std::int64_t kernel = f.weight.size(1);
  const std::int64_t width = kernel - 1;
  const std::vector<double> x = values_of(f.x);
  const std::vector<double> weight = values_of(f.weight);
  const std::vector<double> bias = values_of(f.bias);
  const std::vector<double> initial = values_of(f.initial_states);
  const Tensor out = Tensor::zeros(f.x.shape(), DType::f64);
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };

  for (const TokenRun& run : f.runs->runs) {
    for (std::int64_t c = 0; c < channels; ++c) {
      // The window, then the inputs of the run.
      std::vector<double> line(at(width + run.count), 0.0);
      if (run.first && f.initial_states)
        for (std::int64_t j = 0; j < width; ++j)
          line[at(j)] = initial[at((run.sequence * channels + c) * width + j)];
      const std::int64_t row = (run.row * channels + c) * length;
      for (std::int64_t i = 0; i < run.count; ++i)
        line[at(width + i)] = x[at(row + f.runs->position(run, i))];
      for (std::int64_t i = 0; i < run.count; ++i)
        out.data<double>()[row + f.runs->position(run, i)] =
            output(&weight[at(c * kernel)], kernel, f.bias ? bias[at(c)] : 0.0, &line[at(i)], f.activation);
    }
  }
  f.out.copy_from(out);
}

void update_reference(Context&, const Update& u) {
  const std::int64_t channels = u.x.size(1);
  const std::int64_t tokens = u.x.size(2);
  const std::int64_t kernel = u.weight.size(1);
  const std::int64_t states = u.conv_state.size(2);
  const std::vector<double> weight = values_of(u.weight);
  const std::vector<double> bias = values_of(u.bias);
  const auto at = [](std::int64_t i) { return static_cast<std::size_t>(i); };

  for (const Slot& slot : *u.slots) {
    const Tensor state_row = u.conv_state.select(0, slot.state);
    const std::vector<double> x = values_of(u.x.select(0, slot.row));
    const std::vector<double> state = values_of(state_row);
    const Tensor new_state = Tensor::empty({channels, states}, DType::f64);
    const Tensor out = Tensor::empty({channels, tokens}, DType::f64);
    for (std::int64_t c = 0; c < channels; ++c) {
      // Everything remembered, the oldest first, then the new inputs.
      std::vector<double> line;
      for (std::int64_t j = 0; j < states; ++j) {
        const std::int64_t from = slot.ring < 0 ? j : (slot.ring + j) % states;
        line.push_back(state[at(c * states + from)]);
      }
      for (std::int64_t t = 0; t < tokens; ++t) line.push_back(x[at(c * tokens + t)]);

      for (std::int64_t t = 0; t < tokens; ++t)
        out.data<double>()[c * tokens + t] =
            output(&weight[at(c * kernel)], kernel, u.bias ? bias[at(c)] : 0.0,
                   &line[at(states + t - (kernel - 1))], u.activation);
      for (std::int64_t j = 0; j < states; ++j) {
        const std::int64_t to = slot.ring < 0 ? j : (slot.ring + tokens + j) % states;
        new_state.data<double>()[c * states + to] = line[at(tokens + j)];
      }
    }
    u.out.select(0, slot.row).copy_from(out);
    state_row.copy_from(new_state);
  }
}

}  // namespace krait::conv_detail
