#include <limits>
#include <vector>

#include "core/build.h"
#include "krait/core/error.h"
#include "krait/ops/sampling.h"
#include "ops/sampling/sampling_internal.h"

namespace krait {
namespace {

constexpr const char* kOp = "sample_rows";

void validate(const SampleRowsArgs& args) {
  validate(args.options);
  require(args.logits.defined() && args.logits.ndim() == 2, "[", kOp, "] logits has shape ",
          args.logits.shape(), ", expected (B, V)");
  const DType dtype = args.logits.dtype();
  require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16, "[", kOp, "] logits has dtype ",
          dtype, ", expected f32, bf16 or f16");
  const std::int64_t rows = args.logits.size(0);
  const std::int64_t columns = args.logits.size(1);
  require(args.vocab_size > 0 && args.vocab_size <= columns, "[", kOp, "] vocab_size is ", args.vocab_size,
          ", expected 1 to ", columns, ", the number of logits");
  // Half of what an int holds: parts of rows are rounded up.
  require(columns < std::int64_t{1} << 30, "[", kOp, "] ", columns, " logits, expected fewer than 2^30");
  const auto require_row = [&](const char* name, const Tensor& t, DType wanted) {
    require(t.defined() && t.dtype() == wanted && t.shape() == Dims{rows}, "[", kOp, "] ", name,
            " has shape ", t.shape(), " and dtype ", t.dtype(), ", expected ", Dims{rows}, " and ", wanted);
  };
  require_row("ids", args.ids, DType::i64);
  if (args.logprobs) require_row("logprobs", args.logprobs, DType::f32);
  if (args.positions || !sampling::is_argmax(args.options))
    require_row("positions", args.positions, DType::i64);
  if (args.streams)
    require_row("streams", args.streams, args.streams.dtype() == DType::i32 ? DType::i32 : DType::i64);
  require(!args.seen || (args.seen.dtype() == DType::u8 && args.seen.shape() == args.logits.shape()), "[",
          kOp, "] seen has shape ", args.seen.shape(), " and dtype ", args.seen.dtype(), ", expected ",
          args.logits.shape(), " and u8");
  require(args.seen.defined() || args.options.repetition_penalty == 1.0, "[", kOp,
          "] seen is absent, a repetition penalty needs it");
}

void sample_row(const SampleRowsArgs& args, std::int64_t row) {
  const Tensor logits = args.logits.select(0, row).to(DType::f32).contiguous();
  std::vector<std::int64_t> previous;
  std::uint8_t* seen = nullptr;
  if (args.seen) {
    seen = args.seen.data<std::uint8_t>() + row * args.seen.stride(0);
    for (std::int64_t id = 0; id < args.seen.size(1); ++id)
      if (seen[id * args.seen.stride(1)] != 0) previous.push_back(id);
  }
  std::int64_t stream = row;
  if (args.streams)
    stream = args.streams.dtype() == DType::i64
                 ? args.streams.data<std::int64_t>()[row * args.streams.stride(0)]
                 : args.streams.data<std::int32_t>()[row * args.streams.stride(0)];
  Rng rng(args.seed, static_cast<std::uint64_t>(stream));
  std::int64_t* position =
      args.positions ? args.positions.data<std::int64_t>() + row * args.positions.stride(0) : nullptr;
  if (position != nullptr) rng.set_position(static_cast<std::uint64_t>(*position));
  const Sample drawn = sample(logits.span<float>(), args.vocab_size, previous, args.options, rng);
  if (position != nullptr) *position = static_cast<std::int64_t>(rng.position());
  args.ids.data<std::int64_t>()[row * args.ids.stride(0)] = drawn.id;
  if (args.logprobs) args.logprobs.data<float>()[row * args.logprobs.stride(0)] = drawn.logprob;
  if (seen != nullptr) seen[drawn.id * args.seen.stride(1)] = 1;
}

}  // namespace

void sample_rows(Context& ctx, const SampleRowsArgs& args) {
  require_on_device(ctx, kOp,
                    {{"logits", args.logits},
                     {"streams", args.streams},
                     {"positions", args.positions},
                     {"seen", args.seen},
                     {"ids", args.ids},
                     {"logprobs", args.logprobs}});
  validate(args);
  ctx.set_backend(kOp, ctx.on_gpu() ? "cuda" : "rows");
  if (args.logits.size(0) == 0) return;
  if constexpr (kWithCuda) {
    if (ctx.on_gpu()) return sampling::sample_rows_cuda(ctx, args);
  }
  for (std::int64_t row = 0; row < args.logits.size(0); ++row) sample_row(args, row);
}

}  // namespace krait
