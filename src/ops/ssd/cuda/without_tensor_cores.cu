// In the place of the kernels on NVIDIA's tensor cores, in builds for HIP: they are never chosen, for the
// compute capability of the device is 0.
#include <limits>

#include "krait/core/error.h"
#include "ops/ssd/cuda/backward.cuh"
#include "ops/ssd/cuda/inputs.cuh"

namespace krait::ssd_detail {
namespace {

[[noreturn]] void refuse() {
  fail(ErrorKind::invalid_argument,
       "[ssd] this build has no kernels on tensor cores: it is one for AMD GPUs");
}

}  // namespace

void chunked_ends(Context&, const Inputs&, const Segments&, const Tensor&) { refuse(); }
void chunked_outputs(Context&, const Inputs&, const Segments&, const Tensor&, const Problem&) { refuse(); }
void persistent_outputs(Context&, const Inputs&, const Segments&, std::int64_t, const Problem&) { refuse(); }
void chunked_gradient_ends(Context&, const Inputs&, const Segments&, const Tensor&, bool, const Tensor&) {
  refuse();
}
void chunk_states(Context&, const Inputs&, const Segments&, const Segments&, const Tensor&, const Tensor&) {
  refuse();
}
void chunk_gradients(Context&, const Inputs&, const Segments&, const Segments&, const Tensor&, const Tensor&,
                     const Tensor&) {
  refuse();
}
void chunked_backward(Context&, const Inputs&, const Segments&, const Tensor&, const Tensor&, const Tensor&,
                      const Gradients&, const Sums&) {
  refuse();
}
std::int64_t warpgroup_columns(std::int64_t) { refuse(); }
void warpgroup_states(Context&, const Inputs&, const Segments&, const Segments&, const BackwardProblem&,
                      const StateTiles&) {
  refuse();
}
void warpgroup_backward(Context&, const Inputs&, const Segments&, const Tensor&, const StateTiles&,
                        const Gradients&, const Sums&) {
  refuse();
}
int warpgroup_backward_shared_memory() { return std::numeric_limits<int>::max(); }
int warpgroup_states_shared_memory() { return std::numeric_limits<int>::max(); }
int chunked_backward_shared_memory() { return std::numeric_limits<int>::max(); }

}  // namespace krait::ssd_detail
