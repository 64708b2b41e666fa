// The forward for whatever the fast kernels leave: any layout, mixed dtypes, complex states, any d_state. A
// thread walks the tokens of one channel in order, its states in memory that caches hold.
#include <cstdint>
#include <cstring>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"

namespace krait::scan {
namespace {

constexpr int kThreads = 128;

template <typename State>
struct Outputs {
  explicit Outputs(const Problem& p)
      : out(p.out),
        last_state(p.last_state),
        states(p.states),
        checkpoints(p.checkpoints ? static_cast<State*>(p.checkpoints.raw()) : nullptr) {}

  AnyView<3> out;
  StateView<State, 3> last_state;
  StateView<State, 4> states;
  State* checkpoints;  // (K, N, D)
};

// `h`: (piece, N, D).
template <typename State>
__global__ void __launch_bounds__(kThreads)
    walk_forward(Inputs<State> in, Outputs<State> to, Pieces pieces, State* h) {
  const std::int64_t channels = in.channels;
  for (std::int64_t item = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; item < pieces.count * channels;
       item += std::int64_t{gridDim.x} * kThreads) {
    const std::int64_t d = item % channels;
    const Piece piece = pieces.at(item / channels);
    const std::int64_t g = in.group_of(d);
    State* const state = h + item / channels * in.d_state * channels + d;
    for (std::int64_t n = 0; n < in.d_state; ++n) state[n * channels] = in.state_before(piece, d, n);
    std::int64_t request = piece.requests_begin;
    const auto keep_states = [&](std::int64_t tokens) {
      if (to.checkpoints != nullptr && piece.has_checkpoint_after(tokens)) {
        const std::int64_t k = piece.checkpoint + tokens / kCheckpointSteps - 1;
        for (std::int64_t n = 0; n < in.d_state; ++n)
          to.checkpoints[(k * in.d_state + n) * channels + d] = state[n * channels];
      }
      for (; to.states && request < piece.requests_end && pieces.requests[request].count == tokens; ++request)
        for (std::int64_t n = 0; n < in.d_state; ++n)
          to.states.set(state[n * channels], pieces.requests[request].row, pieces.requests[request].slot, d,
                        n);
    };
    keep_states(0);
    for (std::int64_t i = 0; i < piece.count; ++i) {
      const std::int64_t t = pieces.position(piece, i);
      float dt = in.raw_step(piece.row, d, t);
      if (in.softplus) dt = cuda::softplus(dt);
      const float u = in.u.load(piece.row, d, t);
      float y = 0.0F;
      for (std::int64_t n = 0; n < in.d_state; ++n) {
        State& s = state[n * channels];
        s = exponential(dt * in.A.get(d, n)) * s + dt * u * in.B.get(piece.row, g, d, n, t);
        if (to.out) y += kCounted<State> * real_part(in.C.get(piece.row, g, d, n, t) * s);
      }
      if (to.out) {
        if (in.D) y += in.D.load(d) * u;
        if (in.z) y *= cuda::silu(in.z.load(piece.row, d, t));
        to.out.store(y, piece.row, d, t);
      }
      keep_states(i + 1);
    }
    if (to.last_state && piece.last)
      for (std::int64_t n = 0; n < in.d_state; ++n)
        to.last_state.set(state[n * channels], piece.sequence, d, n);
  }
}

// 0 at each (row, position) of `tokens`, for each channel.
__global__ void __launch_bounds__(kThreads)
    clear_tokens(AnyView<3> out, std::int64_t channels, const TokenRuns::Token* tokens, std::int64_t count) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count * channels;
       i += std::int64_t{gridDim.x} * kThreads) {
    const TokenRuns::Token token = tokens[i / channels];
    out.store(0.0F, token.row, i % channels, token.position);
  }
}

template <typename State>
void run_plain(Context& ctx, const Problem& p, const UploadedPieces& uploaded) {
  const Pieces& pieces = uploaded.pieces;
  const Tensor h = ctx.empty({pieces.count, p.d_state, p.channels, kNumbers<State>});
  cuda::launch(ctx, "selective_scan_plain", walk_forward<State>,
               dim3(cuda::blocks_for(ctx, pieces.count * p.channels, kThreads)), dim3(kThreads), 0,
               Inputs<State>(p), Outputs<State>(p), pieces, static_cast<State*>(h.raw()));
}

}  // namespace

void clear_padding(Context& ctx, const Problem& p, std::initializer_list<const Tensor*> tensors) {
  const auto count = static_cast<std::int64_t>(p.runs.padding.size());
  if (count == 0 || p.channels == 0) return;
  const Tensor staged =
      Tensor::empty({count * static_cast<std::int64_t>(sizeof(TokenRuns::Token))}, DType::u8);
  std::memcpy(staged.raw(), p.runs.padding.data(), staged.nbytes());
  const Tensor tokens = ctx.to_device(staged);
  for (const Tensor* t : tensors)
    if (*t)
      cuda::launch(ctx, "selective_scan_padding", clear_tokens,
                   dim3(cuda::blocks_for(ctx, count * p.channels, kThreads)), dim3(kThreads), 0,
                   AnyView<3>(*t), p.channels, static_cast<const TokenRuns::Token*>(tokens.raw()), count);
}

void run_plain_forward(Context& ctx, const Problem& p) {
  const UploadedPieces pieces = upload_pieces(ctx, p, kWholeRuns);
  if (pieces.pieces.count * p.channels == 0) return;
  p.complex ? run_plain<Complex>(ctx, p, pieces) : run_plain<float>(ctx, p, pieces);
}

}  // namespace krait::scan
