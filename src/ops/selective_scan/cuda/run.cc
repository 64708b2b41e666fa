// Which kernels a problem takes on a GPU.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>

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

bool has_channels_together(const Problem& p, std::initializer_list<const Tensor*> tensors) {
  constexpr std::int64_t kMostTokens = 1 << 30;
  constexpr std::int64_t kTogether = 4;
  if (!fits_tiles(p) || !p.delta_softplus || p.d_state > 16 || p.u.size(2) >= kMostTokens ||
      !p.runs.positions.empty() || p.channels / p.groups % kTogether != 0)
    return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) {
    return *t && t->dtype() == p.u.dtype() && t->stride(1) == 1 && t->stride(0) % kTogether == 0 &&
           t->stride(2) % kTogether == 0 && std::abs(t->stride(2)) < kMostApart &&
           reinterpret_cast<std::uintptr_t>(t->raw()) %
                   static_cast<std::uintptr_t>(kTogether * size_of(t->dtype())) ==
               0;
  });
}

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
