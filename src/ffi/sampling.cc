#include "krait/ops/sampling.h"

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

// Of one row, on the CPU: logits (V) f32, previous (n) i64 or None, out (V) f32.
void sampling_distribution(Given logits, std::int64_t vocab_size, Given previous, double temperature,
                           std::int64_t top_k, double top_p, double min_p, double repetition_penalty,
                           Given out) {
  Operands of("sampling_distribution");
  const Tensor row = of("logits", logits);
  const Tensor ids = of("previous", previous);
  const Tensor to = of("out", out);
  require(row && to, "[sampling_distribution] logits and out must be given");
  require(row.ndim() == 1 && row.dtype() == DType::f32 && row.device().kind == Device::Kind::cpu,
          "[sampling_distribution] logits has shape ", row.shape(), " and dtype ", row.dtype(), " on ",
          name_of(row.device()), ", expected (V) f32 on cpu");
  require(!ids || (ids.ndim() == 1 && ids.dtype() == DType::i64 && ids.device().kind == Device::Kind::cpu),
          "[sampling_distribution] previous has shape ", ids.shape(), " and dtype ", ids.dtype(),
          ", expected (n) i64 on cpu");
  require(to.shape() == row.shape(), "[sampling_distribution] out has shape ", to.shape(), ", expected ",
          row.shape());
  const Tensor dense = row.contiguous();
  const Tensor dense_ids = ids ? ids.contiguous() : Tensor::empty({0}, DType::i64);
  const std::vector<float> distribution =
      krait::sampling_distribution(dense.span<float>(), vocab_size, dense_ids.span<std::int64_t>(),
                                   options_of(temperature, top_k, top_p, min_p, repetition_penalty));
  to.copy_from(Tensor::from(distribution));
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(sample_rows, krait::ffi::sample_rows)
KRAIT_FFI(sampling_distribution, krait::ffi::sampling_distribution)
