// The backward for whatever the fast kernels leave. A thread unwinds one channel from checkpoint to
// checkpoint: it walks the kCheckpointSteps tokens between two of them forward, keeping each state, then
// back.
#include <algorithm>
#include <cstdint>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"

namespace krait::scan {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// Sums over the channels of a block that are gathered between two barriers.
constexpr int kGathered = 32;

template <typename State>
struct Results {
  Results(const Gradients& gradients, const PartialSums& sums)
      : dout(gradients.dout),
        dlast_state(gradients.dlast_state),
        checkpoints(gradients.checkpoints ? static_cast<const State*>(gradients.checkpoints.raw()) : nullptr),
        du(gradients.du),
        ddelta(gradients.ddelta),
        dz(gradients.dz),
        dinitial_state(gradients.dinitial_state),
        dB(floats(sums.dB)),
        dC(floats(sums.dC)),
        dA(floats(sums.dA)),
        constant_dB(floats(sums.constant_dB)),
        constant_dC(floats(sums.constant_dC)),
        dD(floats(sums.dD)),
        ddelta_bias(floats(sums.ddelta_bias)) {}

  static float* floats(const Tensor& t) { return t ? static_cast<float*>(t.raw()) : nullptr; }

  AnyView<3> dout;
  StateView<State, 3> dlast_state;
  const State* checkpoints;
  AnyView<3> du;
  AnyView<3> ddelta;
  AnyView<3> dz;
  StateView<State, 3> dinitial_state;
  float* dB;
  float* dC;
  float* dA;
  float* constant_dB;
  float* constant_dC;
  float* dD;
  float* ddelta_bias;
};

// A block's memory, (..., thread): states before each token of a stretch and after the last, the gradient of
// the state.
template <typename State>
struct Scratch {
  State* states;  // (kCheckpointSteps + 1, N, kThreads)
  State* g;       // (N, kThreads)
  __device__ State& state(std::int64_t i, std::int64_t n, std::int64_t d_state) const {
    return states[(i * d_state + n) * kThreads + threadIdx.x];
  }
  __device__ State& gradient(std::int64_t n) const { return g[n * kThreads + threadIdx.x]; }
};

// to[n] = the sum of value(n) over the block, for n below `count`; all threads of the block call it.
template <typename F>
__device__ void sum_over_block(std::int64_t count, float* to, float (&gathered)[kGathered][kWarps],
                               F&& value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (std::int64_t begin = 0; begin < count; begin += kGathered) {
    const int here = count - begin < kGathered ? static_cast<int>(count - begin) : kGathered;
    for (int i = 0; i < here; ++i) {
      const float sum = cuda::warp_sum(value(begin + i));
      if (lane == 0) gathered[i][warp] = sum;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < here) {
      float sum = 0.0F;
      for (int w = 0; w < kWarps; ++w) sum += gathered[threadIdx.x][w];
      to[begin + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

__device__ __forceinline__ float component(float v, std::int64_t) { return v; }
__device__ __forceinline__ float component(Complex v, std::int64_t i) { return i == 0 ? v.re : v.im; }

__device__ __forceinline__ void add_to(float* at, std::int64_t, float v) { *at += v; }
__device__ __forceinline__ void add_to(float* at, std::int64_t apart, Complex v) {
  at[0] += v.re;
  at[apart] += v.im;
}

template <typename State>
__global__ void __launch_bounds__(kThreads)
    walk_backward(Inputs<State> in, Results<State> to, Pieces pieces, std::int64_t tiles, std::int64_t length,
                  State* scratch) {
  __shared__ float gathered[kGathered][kWarps];
  const std::int64_t N = in.d_state;
  const std::int64_t channels = in.channels;
  const std::int64_t in_group = channels / in.groups;
  const std::int64_t numbers = kNumbers<State> * N;
  Scratch<State> own;
  own.states = scratch + blockIdx.x * (kCheckpointSteps + 2) * N * kThreads;
  own.g = own.states + (kCheckpointSteps + 1) * N * kThreads;

  for (std::int64_t item = blockIdx.x; item < pieces.count * in.groups * tiles; item += gridDim.x) {
    const std::int64_t tile = item % tiles;
    const std::int64_t g = item / tiles % in.groups;
    const std::int64_t piece_index = item / (tiles * in.groups);
    const Piece piece = pieces.at(piece_index);
    const std::int64_t row = piece.row;
    // Threads beyond the group's channels go along for the sums, with nothing in their hands.
    const bool active = tile * kThreads + threadIdx.x < in_group;
    const std::int64_t d = active ? g * in_group + tile * kThreads + threadIdx.x : g * in_group;
    float dD = 0.0F;
    float ddelta_bias = 0.0F;
    const std::int64_t parameters = piece_index * numbers * channels + d;

    for (std::int64_t n = 0; n < N; ++n) {
      own.gradient(n) =
          active && piece.last && to.dlast_state ? to.dlast_state.get(piece.sequence, d, n) : State{};
      for (float* sums : {to.dA, to.constant_dB, to.constant_dC})
        if (sums != nullptr && active)
          for (int part = 0; part < kNumbers<State>; ++part)
            sums[parameters + (part * N + n) * channels] = 0.0F;
    }

    const std::int64_t stretches = (piece.count + kCheckpointSteps - 1) / kCheckpointSteps;
    for (std::int64_t stretch = stretches - 1; stretch >= 0; --stretch) {
      const std::int64_t begin = stretch * kCheckpointSteps;
      const std::int64_t left = piece.count - begin;
      const std::int64_t count = left < kCheckpointSteps ? left : kCheckpointSteps;
      for (std::int64_t n = 0; n < N; ++n) {
        if (stretch == 0)
          own.state(0, n, N) = in.state_before(piece, d, n);
        else
          own.state(0, n, N) = to.checkpoints[((piece.checkpoint + stretch - 1) * N + n) * channels + d];
      }
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t t = pieces.position(piece, begin + i);
        float dt = in.raw_step(row, d, t);
        if (in.softplus) dt = cuda::softplus(dt);
        const float input = dt * in.u.load(row, d, t);
        for (std::int64_t n = 0; n < N; ++n)
          own.state(i + 1, n, N) =
              exponential(dt * in.A.get(d, n)) * own.state(i, n, N) + input * in.B.get(row, g, d, n, t);
      }
      for (std::int64_t i = count - 1; i >= 0; --i) {
        const std::int64_t t = pieces.position(piece, begin + i);
        const float raw = in.raw_step(row, d, t);
        const float dt = in.softplus ? cuda::softplus(raw) : raw;
        const float u = in.u.load(row, d, t);
        float dy = to.dout.load(row, d, t);
        if (in.z) {
          const float z = in.z.load(row, d, t);
          const float gate = cuda::sigmoid(z);
          if (to.dz) {
            float y = in.D ? in.D.load(d) * u : 0.0F;
            for (std::int64_t n = 0; n < N; ++n)
              y += kCounted<State> * real_part(in.C.get(row, g, d, n, t) * own.state(i + 1, n, N));
            if (active) to.dz.store(dy * y * gate * (1.0F + z * (1.0F - gate)), row, d, t);
          }
          dy *= z * gate;
        }
        const float counted = kCounted<State> * dy;
        const std::int64_t sums_at = ((tile * in.rows + row) * length + t) * in.groups + g;
        if (to.dC != nullptr)
          sum_over_block(numbers, to.dC + sums_at * numbers, gathered, [&](std::int64_t j) {
            return active ? component(counted * conjugate(own.state(i + 1, j % N, N)), j / N) : 0.0F;
          });
        float dinput = 0.0F;
        for (std::int64_t n = 0; n < N; ++n) {
          State& dh = own.gradient(n);
          dh = dh + counted * conjugate(in.C.get(row, g, d, n, t));
          dinput += real_part(dh * conjugate(in.B.get(row, g, d, n, t)));
        }
        if (to.dB != nullptr)
          sum_over_block(numbers, to.dB + sums_at * numbers, gathered, [&](std::int64_t j) {
            return active ? component(dt * u * own.gradient(j % N), j / N) : 0.0F;
          });
        float ddt = 0.0F;
        for (std::int64_t n = 0; n < N; ++n) {
          State& dh = own.gradient(n);
          const std::int64_t at = parameters + n * channels;
          if (to.constant_dC != nullptr && active)
            add_to(to.constant_dC + at, N * channels, counted * conjugate(own.state(i + 1, n, N)));
          if (to.constant_dB != nullptr && active) add_to(to.constant_dB + at, N * channels, dt * u * dh);
          const State A = in.A.get(d, n);
          const State decay = exponential(dt * A);
          // Through exp(dt A) h: the gradient of the exponent dt A.
          const State dexponent = dh * conjugate(decay * own.state(i, n, N));
          ddt += real_part(dexponent * conjugate(A));
          if (to.dA != nullptr && active) add_to(to.dA + at, N * channels, dt * dexponent);
          dh = dh * conjugate(decay);
        }
        ddt += dinput * u;
        if (in.softplus && raw <= 20.0F) ddt *= cuda::sigmoid(raw);
        if (active && to.du) to.du.store(dinput * dt + (in.D ? in.D.load(d) * dy : 0.0F), row, d, t);
        if (active && to.ddelta) to.ddelta.store(ddt, row, d, t);
        dD += dy * u;
        ddelta_bias += ddt;
      }
    }

    if (!active) continue;
    if (to.dinitial_state && piece.first)
      for (std::int64_t n = 0; n < N; ++n) to.dinitial_state.set(own.gradient(n), piece.sequence, d, n);
    if (to.dD != nullptr) to.dD[piece_index * channels + d] = dD;
    if (to.ddelta_bias != nullptr) to.ddelta_bias[piece_index * channels + d] = ddelta_bias;
  }
}

template <typename State>
void run_plain(Context& ctx, const Problem& p, const Gradients& gradients) {
  const UploadedPieces uploaded = upload_pieces(ctx, p, kWholeRuns);
  const Pieces& pieces = uploaded.pieces;
  const std::int64_t tiles = (p.channels / p.groups + kThreads - 1) / kThreads;
  const std::int64_t items = pieces.count * p.groups * tiles;
  const PartialSums sums = make_sums(ctx, p, gradients, tiles, pieces.count);
  if (items > 0) {
    // Blocks as many as there are, or as their memory allows: they take one item after the other.
    const std::int64_t block = (kCheckpointSteps + 2) * p.d_state * kThreads * kNumbers<State>;
    constexpr std::int64_t kFloats = std::int64_t{1} << 26;
    const std::int64_t blocks =
        std::clamp<std::int64_t>(std::min<std::int64_t>(items, kFloats / std::max<std::int64_t>(block, 1)), 1,
                                 std::int64_t{cuda::limits_of(ctx).multiprocessors} * 8);
    const Tensor scratch = ctx.empty({blocks, block});
    cuda::launch(ctx, "selective_scan_backward_plain", walk_backward<State>,
                 dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, Inputs<State>(p),
                 Results<State>(gradients, sums), pieces, tiles, p.u.size(2),
                 static_cast<State*>(scratch.raw()));
  }
  finish_sums(ctx, p, gradients, sums);
}

}  // namespace

void run_plain_backward(Context& ctx, const Problem& p, const Gradients& given) {
  Gradients gradients = given;
  if (!gradients.checkpoints) {
    // A walk over all tokens that keeps nothing else.
    Problem states = p;
    states.out = states.last_state = {};
    states.checkpoints =
        ctx.empty({count_checkpoints(p.runs), p.d_state, p.channels}, p.complex ? DType::c64 : DType::f32);
    if (states.checkpoints.numel() > 0) run_plain_forward(ctx, states);
    gradients.checkpoints = states.checkpoints;
  }
  p.complex ? run_plain<Complex>(ctx, p, gradients) : run_plain<float>(ctx, p, gradients);
}

}  // namespace krait::scan
