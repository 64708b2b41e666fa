#include <algorithm>
#include <complex>
#include <cstdint>
#include <type_traits>

#include "core/convert.h"
#include "core/dispatch.h"
#include "ops/selective_scan/backward.h"

namespace krait::scan {
namespace {

// tensor[first_channel + c, n] += from[n width + c]; the imaginary half of complex ones lies `half` behind.
void add_matrix(const Tensor& tensor, std::int64_t first_channel, std::int64_t channels, std::int64_t states,
                const float* from, std::int64_t width) {
  const std::int64_t half = states * width;
  dispatch_all(tensor.dtype(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const to = tensor.data<T>() + first_channel * tensor.stride(0);
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t n = 0; n < states; ++n) {
        T& value = to[c * tensor.stride(0) + n * tensor.stride(1)];
        const float sum = from[n * width + c];
        if constexpr (std::is_same_v<T, std::complex<float>>)
          value += T(sum, from[half + n * width + c]);
        else if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bf16> || std::is_same_v<T, f16>)
          value = convert<T>(convert<float>(value) + sum);
      }
    }
  });
}

}  // namespace

void finish_block(const BackwardPlan& plan, std::int64_t index) {
  const Problem& p = plan.problem;
  const std::int64_t group = index / plan.division.blocks;
  const std::int64_t block = index % plan.division.blocks;
  float* const total = plan.block_at(0, group, block);
  for (std::int64_t part = 1; part < plan.division.parts; ++part) {
    const float* const more = plan.block_at(part, group, block);
    for (std::int64_t i = 0; i < plan.block_size(); ++i) total[i] += more[i];
  }

  const std::int64_t in_group = p.channels / p.groups;
  const std::int64_t first = block * plan.division.block;
  const std::int64_t channels = std::min(plan.division.block, in_group - first);
  BlockSums sums;
  sums.place(total, p, plan.width);
  const auto add = [&](const Tensor& gradient, const float* from) {
    if (!gradient) return;
    const Tensor matrix = gradient.ndim() == 1 ? gradient.unsqueeze(1) : gradient;
    add_matrix(matrix, group * in_group + first, channels, matrix.size(1), from, plan.width);
  };
  add(plan.gradients.dA, sums.dA);
  if (p.B.ndim() == 2) add(plan.gradients.dB, sums.dB);
  if (p.C.ndim() == 2) add(plan.gradients.dC, sums.dC);
  add(plan.gradients.dD, sums.dD);
  add(plan.gradients.ddelta_bias, sums.ddelta_bias);
}

namespace {

// Of one factor.
void finish_tokens(const BackwardPlan& plan, const Tensor& gradient, float* sums, std::int64_t batch,
                   std::int64_t begin, std::int64_t end) {
  const Problem& p = plan.problem;
  const std::int64_t floats = (end - begin) * plan.token_size();
  float* const total = sums + (batch * p.u.size(2) + begin) * plan.token_size();
  for (std::int64_t segment = 1; segment < plan.division.segments; ++segment) {
    const float* const more = total + segment * plan.tokens() * plan.token_size();
    for (std::int64_t i = 0; i < floats; ++i) total[i] += more[i];
  }
  const std::int64_t numbers = plan.numbers();
  const std::int64_t group_size = numbers * p.d_state;
  if (gradient.size(1) < p.groups) {  // one group serves all
    for (std::int64_t t = 0; t < end - begin; ++t)
      for (std::int64_t i = group_size; i < plan.token_size(); ++i)
        total[t * plan.token_size() + i % group_size] += total[t * plan.token_size() + i];
  }
  dispatch_float(gradient.dtype(), "dB or dC", [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t g = 0; g < gradient.size(1); ++g)
      for (std::int64_t part = 0; part < numbers; ++part)
        for (std::int64_t n = 0; n < p.d_state; ++n) {
          const float* from = total + g * group_size + part * p.d_state + n;
          T* const to = gradient.data<T>() + batch * gradient.stride(0) + g * gradient.stride(1) +
                        n * gradient.stride(2) + part * gradient.stride(3);
          for (std::int64_t t = begin; t < end; ++t, from += plan.token_size())
            to[numbers * t * gradient.stride(3)] = convert<T>(*from);
        }
  });
}

}  // namespace

void finish_tokens(const BackwardPlan& plan, std::int64_t batch, std::int64_t begin, std::int64_t end) {
  if (plan.dB != nullptr) finish_tokens(plan, plan.gradients.dB, plan.dB, batch, begin, end);
  if (plan.dC != nullptr) finish_tokens(plan, plan.gradients.dC, plan.dC, batch, begin, end);
}

}  // namespace krait::scan
