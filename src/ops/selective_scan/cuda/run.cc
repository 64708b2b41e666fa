// Which kernels a problem takes on a GPU.
#include "krait/core/context.h"
#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/scan.h"

namespace krait::scan {
namespace {

// The final state of a sequence may lie where its initial one does. The two are those of different runs where
// a sequence has several, and of different pieces: nothing orders these.
Tensor apart(Context& ctx, const Tensor& read, const Tensor& written) {
  return read && written && read.raw() == written.raw() ? ctx.clone(read) : read;
}

}  // namespace

void run_cuda(Context& ctx, const Problem& problem) {
  Problem p = problem;
  p.initial_state = apart(ctx, p.initial_state, p.last_state);
  clear_padding(ctx, p, {&p.out});
  if (!run_fast_forward(ctx, p)) run_plain_forward(ctx, p);
}

void run_cuda_backward(Context& ctx, const Problem& p, const Gradients& given) {
  Gradients gradients = given;
  gradients.dlast_state = apart(ctx, given.dlast_state, given.dinitial_state);
  clear_padding(ctx, p, {&gradients.du, &gradients.ddelta, &gradients.dz});
  if (!run_fast_backward(ctx, p, gradients)) run_plain_backward(ctx, p, gradients);
}

}  // namespace krait::scan
