#include "krait/ops/sampling.h"

#include <tvm/ffi/container/tuple.h>

#include <span>
#include <vector>

#include "ffi/contexts.h"
#include "ffi/convert.h"

namespace krait::ffi {
namespace {

SamplingOptions options_of(double temperature, std::int64_t top_k, double top_p, double min_p,
                           double repetition_penalty) {
  return {.temperature = temperature,
          .top_k = top_k,
          .top_p = top_p,
          .min_p = min_p,
          .repetition_penalty = repetition_penalty};
}

void sample_rows(Given logits, std::int64_t vocab_size, double temperature, std::int64_t top_k, double top_p,
                 double min_p, double repetition_penalty, std::int64_t seed, Given streams, Given positions,
                 Given seen, Given ids, Given logprobs) {
  Operands of("sample_rows");
  const SampleRowsArgs args{.logits = of("logits", logits),
                            .vocab_size = vocab_size,
                            .options = options_of(temperature, top_k, top_p, min_p, repetition_penalty),
                            .seed = static_cast<std::uint64_t>(seed),
                            .streams = of("streams", streams),
                            .positions = of("positions", positions),
                            .seen = of("seen", seen),
                            .ids = of("ids", ids),
                            .logprobs = of("logprobs", logprobs)};
  const Lease ctx(of.device());
  krait::sample_rows(*ctx, args);
}

// One row on the CPU: logits (V) f32 and previous (n) i64 or None, both contiguous then.
struct Row {
  Row(const char* op, const Tensor& given_logits, const Tensor& given_previous) {
    require(given_logits && given_logits.ndim() == 1 && given_logits.dtype() == DType::f32 &&
                given_logits.device().kind == Device::Kind::cpu,
            "[", op, "] logits has shape ", given_logits.shape(), " and dtype ", given_logits.dtype(), " on ",
            name_of(given_logits.device()), ", expected (V) f32 on cpu");
    require(!given_previous || (given_previous.ndim() == 1 && given_previous.dtype() == DType::i64 &&
                                given_previous.device().kind == Device::Kind::cpu),
            "[", op, "] previous has shape ", given_previous.shape(), " and dtype ", given_previous.dtype(),
            ", expected (n) i64 on cpu");
    logits = given_logits.contiguous();
    previous = given_previous ? given_previous.contiguous() : Tensor::empty({0}, DType::i64);
  }
  Tensor logits;
  Tensor previous;
};

// The id, its log-probability, and where the generator stands then.
using Drawn = tvm::ffi::Tuple<std::int64_t, double, std::int64_t>;
Drawn sample(Given logits, std::int64_t vocab_size, Given previous, double temperature, std::int64_t top_k,
             double top_p, double min_p, double repetition_penalty, std::int64_t seed, std::int64_t stream,
             std::int64_t position) {
  Operands of("sample");
  const Row row("sample", of("logits", logits), of("previous", previous));
  Rng rng(static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(stream));
  rng.set_position(static_cast<std::uint64_t>(position));
  const Sample drawn = krait::sample(row.logits.span<float>(), vocab_size, row.previous.span<std::int64_t>(),
                                     options_of(temperature, top_k, top_p, min_p, repetition_penalty), rng);
  return Drawn(drawn.id, static_cast<double>(drawn.logprob), static_cast<std::int64_t>(rng.position()));
}

// Of one row; out (V) f32.
void sampling_distribution(Given logits, std::int64_t vocab_size, Given previous, double temperature,
                           std::int64_t top_k, double top_p, double min_p, double repetition_penalty,
                           Given out) {
  Operands of("sampling_distribution");
  const Row row("sampling_distribution", of("logits", logits), of("previous", previous));
  const Tensor to = of("out", out);
  require(to && to.shape() == row.logits.shape(), "[sampling_distribution] out has shape ", to.shape(),
          ", expected ", row.logits.shape());
  const std::vector<float> distribution =
      krait::sampling_distribution(row.logits.span<float>(), vocab_size, row.previous.span<std::int64_t>(),
                                   options_of(temperature, top_k, top_p, min_p, repetition_penalty));
  to.copy_from(Tensor::from(distribution));
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(sample, krait::ffi::sample)
KRAIT_FFI(sample_rows, krait::ffi::sample_rows)
KRAIT_FFI(sampling_distribution, krait::ffi::sampling_distribution)
