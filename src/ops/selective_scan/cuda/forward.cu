// The fast forward: real states, B and C variable. kLanes lanes share a channel, kStates states each; dt and
// dt u of a tile are made by all threads together, walked in order, and turned into outputs by all again.
#include <algorithm>
#include <cstdint>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/tiles.cuh"

namespace krait::scan {
namespace {

struct Operands {
  Operands(const Problem& p, const Pieces& cut)
      : in(p),
        out(p.out),
        last_state(p.last_state),
        states(p.states),
        checkpoints(p.checkpoints ? static_cast<float*>(p.checkpoints.raw()) : nullptr),
        pieces(cut),
        by_channel(p.u.stride(1) == 1 || p.u.stride(2) != 1) {}

  Inputs<float> in;
  AnyView<3> out;
  StateView<float, 3> last_state;
  StateView<float, 4> states;
  float* checkpoints;  // (K, N, D)
  Pieces pieces;
  bool by_channel;
  // Of runs in several pieces: (piece, N, D), and (piece, D).
  const float* carried = nullptr;  // the state before each piece
  float* ends = nullptr;           // to write: the state after each piece that began with 0
  float* steps = nullptr;          // to write: the sum of dt
};

template <int kLanes, int kStates>
constexpr std::size_t shared_bytes() {
  return sizeof(float) * (kTile * FactorTile<kLanes * kStates>::kRow + 2 * kTile * (kBlock / kLanes + 1));
}

// kStatesOnly: no outputs, but states that later passes start from.
template <int kLanes, int kStates, bool kStatesOnly>
__global__ void __launch_bounds__(kBlock, kLanes == 32 ? 2 : 4) walk_tiles(Operands o) {
  using Moves = Share<kLanes>;
  using Factors = FactorTile<kLanes * kStates>;
  constexpr int kCount = Moves::kCount;
  constexpr int kChannels = Moves::kChannels;
  constexpr int kRow = kChannels + 1;
  constexpr bool kAhead = Factors::kRounds == 1;  // B and C of the next tile in registers, as u is
  extern __shared__ __align__(16) float shared[];
  float* const factors = shared;
  auto* const tile_of_steps = reinterpret_cast<float2*>(shared + kTile * Factors::kRow);  // dt, dt u

  const Inputs<float>& in = o.in;
  const std::int64_t in_group = in.channels / in.groups;
  const std::int64_t blocks = (in_group + kChannels - 1) / kChannels;
  const Moves moves(o.by_channel);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int d_state = static_cast<int>(in.d_state);

  for (std::int64_t item = blockIdx.x; item < o.pieces.count * in.groups * blocks; item += gridDim.x) {
    __syncthreads();  // the last tile of the item before has been read
    const std::int64_t piece_index = item / (in.groups * blocks);
    const Piece piece = o.pieces.at(piece_index);
    if (o.ends != nullptr && piece.last_of_run) continue;
    const std::int64_t group = item / blocks % in.groups;
    const std::int64_t first_in_group = item % blocks * kChannels;
    const std::int64_t first = group * in_group + first_in_group;
    const int channels =
        in_group - first_in_group < kChannels ? static_cast<int>(in_group - first_in_group) : kChannels;
    const bool mine = team < channels;
    const std::int64_t d = first + (mine ? team : 0);

    float bias[kCount];
    float skip[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const int c = moves.channel_of(e);
      bias[e] = in.delta_bias && c < channels ? in.delta_bias.load(first + c) : 0.0F;
      skip[e] = !kStatesOnly && in.D && c < channels ? in.D.load(first + c) : 0.0F;
    }
    float A[kStates];
    float h[kStates];
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int n = lane * kStates + k;
      const bool there = mine && n < d_state;
      A[k] = there ? kLog2E * in.A.get(d, n) : 0.0F;
      h[k] = 0.0F;
      if (there && piece.part > 0 && o.carried != nullptr)
        h[k] = o.carried[(piece_index * d_state + n) * in.channels + d];
      else if (there && o.ends == nullptr)
        h[k] = in.state_before(piece, d, n);
    }
    float sum_of_steps = 0.0F;

    std::int64_t request = piece.requests_begin;
    const auto keep_states = [&](std::int64_t tokens) {
      if (o.checkpoints != nullptr && piece.has_checkpoint_after(tokens)) {
        const std::int64_t k0 = piece.checkpoint + tokens / kCheckpointSteps - 1;
#pragma unroll
        for (int k = 0; k < kStates; ++k)
          if (const int n = lane * kStates + k; mine && n < d_state)
            o.checkpoints[(k0 * d_state + n) * in.channels + d] = h[k];
      }
      if constexpr (!kStatesOnly) {
        for (; request < piece.requests_end && o.pieces.requests[request].count == tokens; ++request)
#pragma unroll
          for (int k = 0; k < kStates; ++k)
            if (const int n = lane * kStates + k; mine && n < d_state)
              o.states.set(h[k], o.pieces.requests[request].row, o.pieces.requests[request].slot, d, n);
      }
    };
    keep_states(0);

    // A tile ends at the latest where a multiple of kTile or a wanted state is.
    const auto tokens_from = [&](std::int64_t begin, std::int64_t wanted) {
      std::int64_t end = begin - begin % kTile + kTile;
      end = end < piece.count ? end : piece.count;
      if (!kStatesOnly && wanted < piece.requests_end) {
        const std::int64_t at = o.pieces.requests[wanted].count;
        end = at < end ? at : end;
      }
      return static_cast<int>(end - begin);
    };
    cuda::Bits<kCount> next_u;
    cuda::Bits<kCount> next_delta;
    cuda::Bits<kCount> next_z = {};
    typename Factors::Load next_B;
    typename Factors::Load next_C;
    const auto load_factors = [&](const Tile32& tile) {
      Factors::load(in.B.variable, tile, piece.row, group, d_state, next_B);
      if constexpr (!kStatesOnly) Factors::load(in.C.variable, tile, piece.row, group, d_state, next_C);
    };
    const auto load = [&](const Tile32& tile) {
      load_span(in.u.data, in.u.dtype, moves.span(in.u, tile, piece.row, first, channels), next_u);
      load_span(in.delta.data, in.delta.dtype, moves.span(in.delta, tile, piece.row, first, channels),
                next_delta);
      if (!kStatesOnly && in.z)
        load_span(in.z.data, in.z.dtype, moves.span(in.z, tile, piece.row, first, channels), next_z);
      if constexpr (kAhead) load_factors(tile);
    };
    int count = tokens_from(0, request);
    if (count > 0) load(Tile32(o.pieces, piece, 0, count));

    for (std::int64_t begin = 0; begin < piece.count;) {
      const Tile32 tile(o.pieces, piece, begin, count);
      if constexpr (!kAhead) load_factors(tile);
      Factors::store(in.B.variable, tile, next_B, 0, factors);
      if constexpr (!kStatesOnly) Factors::store(in.C.variable, tile, next_C, 1, factors);
      float u[kCount];
      float delta[kCount];
      const cuda::Bits<kCount> u_here = next_u;
      const cuda::Bits<kCount> z_here = next_z;
      next_u.to_floats(in.u.dtype, u);
      next_delta.to_floats(in.delta.dtype, delta);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int row = tile.row(moves.slot_of(e));
        float dt = delta[e] + bias[e];
        if (in.softplus) dt = softplus_fast(dt);
        // Empty rows leave the state as it is.
        if (row >= tile.count) dt = 0.0F;
        tile_of_steps[row * kRow + moves.channel_of(e)] =
            make_float2(dt, row < tile.count ? dt * u[e] : 0.0F);
      }
      __syncthreads();

      // The next tile is on its way while this one is walked.
      const std::int64_t next = begin + count;
      std::int64_t after = request;
      if constexpr (!kStatesOnly)
        while (after < piece.requests_end && o.pieces.requests[after].count <= next) ++after;
      const int next_count = next < piece.count ? tokens_from(next, after) : 0;
      if (next_count > 0) load(Tile32(o.pieces, piece, next, next_count));

      for (int row = 0; row < count; row += kLanes) {
        float y[kLanes];
#pragma unroll
        for (int s = 0; s < kLanes; ++s) {
          const float2 step = tile_of_steps[(row + s) * kRow + team];
          const float* const bc = factors + (row + s) * Factors::kRow + lane * kStates;
          float B[kStates];
          load_shared(bc, B);
          float C[kStates];
          if constexpr (!kStatesOnly) load_shared(bc + kLanes * kStates, C);
          float sum = 0.0F;
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            h[k] = fmaf(exp2_fast(step.x * A[k]), h[k], step.y * B[k]);
            if constexpr (!kStatesOnly) sum = fmaf(C[k], h[k], sum);
          }
          if constexpr (kStatesOnly)
            sum_of_steps += step.x;
          else
            y[s] = sum;
        }
        // Nobody but these lanes reads dt of these rows, and behind the barrier of the warp they have.
        if constexpr (!kStatesOnly) {
          const float sum = sum_and_scatter<kLanes>(y);
          __syncwarp();
          tile_of_steps[(row + lane) * kRow + team].x = sum;
        }
      }
      keep_states(next);
      __syncthreads();

      if constexpr (!kStatesOnly) {
        float z[kCount];
        u_here.to_floats(in.u.dtype, u);
        z_here.to_floats(in.z.dtype, z);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          float y = tile_of_steps[tile.row(moves.slot_of(e)) * kRow + moves.channel_of(e)].x;
          y = fmaf(skip[e], u[e], y);
          if (in.z) y *= z[e] * sigmoid_fast(z[e]);
          u[e] = y;
        }
        store_span(o.out.data, o.out.dtype, moves.span(o.out, tile, piece.row, first, channels), u);
      }
      begin = next;
      count = next_count;
    }

#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int n = lane * kStates + k;
      if (!mine || n >= d_state) continue;
      if (o.ends != nullptr)
        o.ends[(piece_index * d_state + n) * in.channels + d] = h[k];
      else if (!kStatesOnly && o.last_state && piece.last)
        o.last_state.set(h[k], piece.sequence, d, n);
    }
    if (o.steps != nullptr && mine && lane == 0) o.steps[piece_index * in.channels + d] = sum_of_steps;
  }
}

// From the state after each piece alone to the state before each piece of a run, in place.
__global__ void __launch_bounds__(kBlock)
    carry_states(Inputs<float> in, Pieces pieces, const float* steps, float* states) {
  const std::int64_t size = in.d_state * in.channels;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kBlock + threadIdx.x; i < pieces.count * size;
       i += std::int64_t{gridDim.x} * kBlock) {
    std::int64_t at = i / size;
    Piece piece = pieces.at(at);
    if (piece.part != 0) continue;
    const std::int64_t d = i % in.channels;
    const std::int64_t n = i / in.channels % in.d_state;
    const float A = kLog2E * in.A.get(d, n);
    float h = in.state_before(piece, d, n);
    for (; !piece.last_of_run; piece = pieces.at(++at)) {
      float& state = states[(at * in.d_state + n) * in.channels + d];
      const float end = fmaf(exp2_fast(steps[at * in.channels + d] * A), h, state);
      state = h;
      h = end;
    }
    states[(at * in.d_state + n) * in.channels + d] = h;
  }
}

template <int kLanes, int kStates, bool kStatesOnly>
void launch_tiles(Context& ctx, const Operands& o) {
  constexpr std::int64_t kChannels = kBlock / kLanes;
  const std::int64_t in_group = o.in.channels / o.in.groups;
  const std::int64_t items = o.pieces.count * o.in.groups * ((in_group + kChannels - 1) / kChannels);
  cuda::launch(ctx, kStatesOnly ? "selective_scan_states" : "selective_scan",
               walk_tiles<kLanes, kStates, kStatesOnly>,
               dim3(static_cast<unsigned>(std::min<std::int64_t>(items, 1 << 30))), dim3(kBlock),
               shared_bytes<kLanes, kStates>(), o);
}

template <bool kStatesOnly>
void launch_tiles(Context& ctx, const Operands& o, const LanePlan& plan) {
  switch (plan.lanes * 16 + plan.states) {
    case 4 * 16 + 4: return launch_tiles<4, 4, kStatesOnly>(ctx, o);
    case 8 * 16 + 2: return launch_tiles<8, 2, kStatesOnly>(ctx, o);
    case 16 * 16 + 1: return launch_tiles<16, 1, kStatesOnly>(ctx, o);
    case 8 * 16 + 4: return launch_tiles<8, 4, kStatesOnly>(ctx, o);
    case 16 * 16 + 4: return launch_tiles<16, 4, kStatesOnly>(ctx, o);
    default: return launch_tiles<32, 8, kStatesOnly>(ctx, o);
  }
}

}  // namespace

bool run_fast_forward(Context& ctx, const Problem& p) {
  if (!fits_tiles(p)) return false;
  const LanePlan plan = choose_lanes(std::ssize(p.runs.runs), p.groups, p.channels / p.groups, p.u.size(2),
                                     p.d_state, cuda::limits_of(ctx).multiprocessors);
  const UploadedPieces uploaded = upload_pieces(ctx, p, plan.piece);
  const Pieces& pieces = uploaded.pieces;
  if (pieces.count * p.channels == 0) return true;
  Operands o(p, pieces);
  Tensor states;
  Tensor steps;
  if (pieces.count > std::ssize(p.runs.runs)) {
    states = ctx.empty({pieces.count, p.d_state, p.channels});
    steps = ctx.empty({pieces.count, p.channels});
    Operands ends = o;
    ends.checkpoints = nullptr;
    ends.ends = static_cast<float*>(states.raw());
    ends.steps = static_cast<float*>(steps.raw());
    launch_tiles<true>(ctx, ends, plan);
    cuda::launch(ctx, "selective_scan_carry", carry_states,
                 dim3(cuda::blocks_for(ctx, pieces.count * p.d_state * p.channels, kBlock)), dim3(kBlock), 0,
                 o.in, pieces, static_cast<const float*>(steps.raw()), static_cast<float*>(states.raw()));
    o.carried = static_cast<const float*>(states.raw());
  }
  p.out ? launch_tiles<false>(ctx, o, plan) : launch_tiles<true>(ctx, o, plan);
  return true;
}

}  // namespace krait::scan
