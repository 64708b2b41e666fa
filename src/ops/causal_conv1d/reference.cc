// causal_conv1d as it is defined: every tensor in f64, plain loops.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/causal_conv1d/conv.h"
#include "ops/scalar.h"

namespace krait::conv_detail {
namespace {

double activate(double value, Activation activation) {
  return activation == Activation::silu ? scalar::silu(value) : value;
}

double activation_derivative(double value, Activation activation) {
  return activation == Activation::silu ? scalar::silu_derivative(value) : 1.0;
}

// A contiguous f64 copy, or nothing.
std::vector<double> values_of(const Tensor& t) {
  if (!t) return {};
  const Tensor copy = t.to(DType::f64).contiguous();
  return {copy.data<double>(), copy.data<double>() + copy.numel()};
}

// to += values, in f64.
void add(const Tensor& to, const std::vector<double>& values) {
  const Tensor sum = to.to(DType::f64).clone();
  for (std::size_t i = 0; i < values.size(); ++i) sum.data<double>()[i] += values[i];
  to.copy_from(sum);
}

// bias + sum_k weight_k taps_k; K taps, the oldest first.
double weighted(const double* weight, std::int64_t kernel, double bias, const double* taps) {
  double sum = bias;
  for (std::int64_t k = 0; k < kernel; ++k) sum += weight[k] * taps[k];
  return sum;
}

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

// What one channel of a run is convolved over: the K - 1 inputs before it, then its own.
std::vector<double> line_of(const TokenRuns& runs, const TokenRun& run, std::int64_t width,
                            const double* initial, const double* x) {
  std::vector<double> line(at(width + run.count), 0.0);
  if (run.first && initial != nullptr) std::copy_n(initial, width, line.begin());
  for (std::int64_t i = 0; i < run.count; ++i) line[at(width + i)] = x[runs.position(run, i)];
  return line;
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

  for (const TokenRun& run : f.runs->runs) {
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t row = (run.row * channels + c) * length;
      const std::int64_t state = (run.sequence * channels + c) * width;
      const std::vector<double> line =
          line_of(*f.runs, run, width, f.initial_states ? initial.data() + state : nullptr, x.data() + row);
      for (std::int64_t i = 0; i < run.count; ++i)
        out.data<double>()[row + f.runs->position(run, i)] =
            activate(weighted(&weight[at(c * kernel)], kernel, f.bias ? bias[at(c)] : 0.0, line.data() + i),
                     f.activation);
    }
  }
  f.out.copy_from(out);
}

void backward_reference(Context&, const Backward& b) {
  const std::int64_t channels = b.x.size(1);
  const std::int64_t length = b.x.size(2);
  const std::int64_t kernel = b.weight.size(1);
  const std::int64_t width = kernel - 1;
  const std::vector<double> x = values_of(b.x);
  const std::vector<double> weight = values_of(b.weight);
  const std::vector<double> bias = values_of(b.bias);
  const std::vector<double> initial = values_of(b.initial_states);
  const std::vector<double> dout = values_of(b.dout);
  const std::vector<double> dfinal = values_of(b.dfinal_states);
  const Tensor dx = Tensor::zeros(b.x.shape(), DType::f64);
  const Tensor dinitial = Tensor::zeros({b.runs->sequences, channels, width}, DType::f64);
  std::vector<double> dweight(at(channels * kernel), 0.0);
  std::vector<double> dbias(at(channels), 0.0);

  for (const TokenRun& run : b.runs->runs) {
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t row = (run.row * channels + c) * length;
      const std::int64_t state = (run.sequence * channels + c) * width;
      const double* taps = weight.data() + c * kernel;
      const std::vector<double> line =
          line_of(*b.runs, run, width, b.initial_states ? initial.data() + state : nullptr, x.data() + row);
      // The gradient of the line. Its last K - 1 places are the final state.
      std::vector<double> dline(line.size(), 0.0);
      if (run.last && b.dfinal_states)
        for (std::int64_t j = 0; j < width; ++j) dline[at(run.count + j)] = dfinal[at(state + j)];
      for (std::int64_t i = 0; i < run.count; ++i) {
        const double sum = weighted(taps, kernel, b.bias ? bias[at(c)] : 0.0, line.data() + i);
        const double dsum =
            dout[at(row + b.runs->position(run, i))] * activation_derivative(sum, b.activation);
        dbias[at(c)] += dsum;
        for (std::int64_t k = 0; k < kernel; ++k) {
          dweight[at(c * kernel + k)] += dsum * line[at(i + k)];
          dline[at(i + k)] += dsum * taps[k];
        }
      }
      if (run.first) std::copy_n(dline.begin(), width, dinitial.data<double>() + state);
      for (std::int64_t i = 0; i < run.count; ++i)
        dx.data<double>()[row + b.runs->position(run, i)] = dline[at(width + i)];
    }
  }
  if (b.dx) b.dx.copy_from(dx);
  if (b.dinitial_states) b.dinitial_states.copy_from(dinitial);
  if (b.dweight) add(b.dweight, dweight);
  if (b.dbias) add(b.dbias, dbias);
}

void update_reference(Context&, const Update& u) {
  const std::int64_t channels = u.x.size(1);
  const std::int64_t tokens = u.x.size(2);
  const std::int64_t kernel = u.weight.size(1);
  const std::int64_t states = u.conv_state.size(2);
  const std::vector<double> weight = values_of(u.weight);
  const std::vector<double> bias = values_of(u.bias);

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
            activate(weighted(&weight[at(c * kernel)], kernel, u.bias ? bias[at(c)] : 0.0,
                              &line[at(states + t - (kernel - 1))]),
                     u.activation);
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
