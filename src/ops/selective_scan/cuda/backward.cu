// The fast backward. As in the forward, kLanes lanes share a channel. A tile of kTile tokens is walked
// forward from its checkpoint, keeping the state before each kSub tokens; these are then unwound from the
// last to the first, decays and states of kSub tokens in registers. What B and C get is summed over the
// channels of the block in shared memory.
#include <algorithm>
#include <cstdint>

#include "ops/selective_scan/cuda/kernels.h"
#include "ops/selective_scan/cuda/operands.cuh"
#include "ops/selective_scan/cuda/tiles.cuh"

namespace krait::scan {
namespace {

constexpr int kSub = 8;
constexpr float kLn2 = 0.6931471805599453F;

struct Operands {
  Operands(const Problem& p, const Gradients& gradients, const PartialSums& sums, const Pieces& cut)
      : in(p),
        dout(gradients.dout),
        dlast_state(gradients.dlast_state),
        checkpoints(static_cast<const float*>(gradients.checkpoints.raw())),
        du(gradients.du),
        ddelta(gradients.ddelta),
        dz(gradients.dz),
        dinitial_state(gradients.dinitial_state),
        dB(floats(sums.dB)),
        dC(floats(sums.dC)),
        dA(floats(sums.dA)),
        dD(floats(sums.dD)),
        ddelta_bias(floats(sums.ddelta_bias)),
        pieces(cut),
        length(p.u.size(2)),
        by_channel(p.u.stride(1) == 1 || p.u.stride(2) != 1) {}

  static float* floats(const Tensor& t) { return t ? static_cast<float*>(t.raw()) : nullptr; }

  Inputs<float> in;
  AnyView<3> dout;
  StateView<float, 3> dlast_state;
  const float* checkpoints;  // (K, N, D)
  AnyView<3> du;
  AnyView<3> ddelta;
  AnyView<3> dz;
  StateView<float, 3> dinitial_state;
  float* dB;  // (block of channels, B L, G, N)
  float* dC;
  float* dA;  // (piece, N, D)
  float* dD;  // (piece, D)
  float* ddelta_bias;
  Pieces pieces;
  std::int64_t length;
  bool by_channel;
};

// Shared memory of a block, in floats.
template <int kLanes, int kStates>
struct Layout {
  static constexpr int kChannels = kBlock / kLanes;
  static constexpr int kAll = kLanes * kStates;  // states of a channel
  static constexpr int kRow = 4 * (kChannels + 1);
  static constexpr int kSteps = kTile * FactorTile<kAll>::kRow;  // where each part starts
  static constexpr int kStarts = kSteps + kTile * kRow;
  static constexpr int kShares = kStarts + kTile / kSub * kStates * kBlock;
  static constexpr int kShare = kChannels * kAll;              // of a token, for B or C: (channel, state)
  static constexpr int kTotals = kShares + 2 * kSub * kShare;  // of dD and ddelta_bias: (slot, channel)
  static constexpr int kTotal = kTile * (kChannels + 1);
  static constexpr int kFloats = kTotals + 2 * kTotal;
};

// From kCount values in each of kLanes lanes, each to be summed over the lanes: sum i is put(i, sum) in one
// of them at least.
template <int kLanes, int kCount, typename F>
__device__ __forceinline__ void sum_over_lanes(float (&v)[kCount], F&& put) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  if constexpr (kLanes < kCount) {
#pragma unroll
    for (int begin = 0; begin < kCount; begin += kLanes) {
      float part[kLanes];
#pragma unroll
      for (int i = 0; i < kLanes; ++i) part[i] = v[begin + i];
      put(begin + lane, sum_and_scatter<kLanes>(part));
    }
  } else {
    halve<kCount, kLanes / 2>(v);
    if (lane % (kLanes / kCount) == 0) put(lane / (kLanes / kCount), v[0]);
  }
}

template <int kCount>
__device__ __forceinline__ void store_shared(float* to, const float (&from)[kCount]) {
  constexpr int kTogether = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kTogether) {
    Packed<float, kTogether> packed;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) packed.v[j] = from[i + j];
    *reinterpret_cast<Packed<float, kTogether>*>(to + i) = packed;
  }
}

template <int kLanes, int kStates>
__global__ void __launch_bounds__(kBlock, kLanes == 32 ? 1 : 3) unwind_tiles(Operands o) {
  using Moves = Share<kLanes>;
  using Place = Layout<kLanes, kStates>;
  using Factors = FactorTile<Place::kAll>;
  constexpr int kCount = Moves::kCount;
  constexpr int kChannels = Moves::kChannels;
  extern __shared__ __align__(16) float shared[];
  float* const factors = shared;
  // A cell for each (token, channel): dt, dt u, dy, nothing; then dt and the sums over states of y, of the
  // gradient of dt u and of that of dt.
  auto* const cells = reinterpret_cast<float4*>(shared + Place::kSteps);
  constexpr int kCellRow = kChannels + 1;
  float* const starts = shared + Place::kStarts + threadIdx.x * kStates;
  float* const shares = shared + Place::kShares;

  const Inputs<float>& in = o.in;
  const std::int64_t in_group = in.channels / in.groups;
  const std::int64_t blocks = (in_group + kChannels - 1) / kChannels;
  const Moves moves(o.by_channel);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int d_state = static_cast<int>(in.d_state);

  for (std::int64_t item = blockIdx.x; item < o.pieces.count * in.groups * blocks; item += gridDim.x) {
    __syncthreads();  // the sums of the item before have been read
    const std::int64_t piece_index = item / (in.groups * blocks);
    const Piece piece = o.pieces.at(piece_index);
    const std::int64_t group = item / blocks % in.groups;
    const std::int64_t block = item % blocks;
    const std::int64_t first = group * in_group + block * kChannels;
    const std::int64_t left = in_group - block * kChannels;
    const int channels = left < kChannels ? static_cast<int>(left) : kChannels;
    const bool mine = team < channels;
    const std::int64_t d = first + (mine ? team : 0);

    float A[kStates];  // log2(e) A
    float g[kStates];  // the gradient of the state
    float dA[kStates] = {};
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int n = lane * kStates + k;
      const bool there = mine && n < d_state;
      A[k] = there ? kLog2E * in.A.get(d, n) : 0.0F;
      g[k] = there && piece.last && o.dlast_state ? o.dlast_state.get(piece.sequence, d, n) : 0.0F;
    }
    // Each thread has the cells of its own slots and channels.
    const auto total = [&](int e) {
      return shared + Place::kTotals + moves.slot_of(e) * kCellRow + moves.channel_of(e);
    };
#pragma unroll
    for (int e = 0; e < kCount; ++e) total(e)[0] = total(e)[Place::kTotal] = 0.0F;

    for (std::int64_t begin = piece.count == 0 ? -1 : (piece.count - 1) / kTile * kTile; begin >= 0;
         begin -= kTile) {
      const int count = piece.count - begin < kTile ? static_cast<int>(piece.count - begin) : kTile;
      const Tile32 tile(o.pieces, piece, begin, count);
      using Elements = cuda::Bits<kCount>;
      const auto load = [&](const AnyView<3>& view, Elements& to) {
        load_span(view.data, view.dtype, moves.span(view, tile, piece.row, first, channels), to);
      };
      const auto bias_of = [&](int e) {
        const int c = moves.channel_of(e);
        return in.delta_bias && c < channels ? in.delta_bias.load(first + c) : 0.0F;
      };
      {
        // All on their way before the first is looked at.
        Elements u_bits;
        Elements delta_bits;
        Elements dout_bits;
        Elements z_bits;
        typename Factors::Load B;
        load(in.u, u_bits);
        load(in.delta, delta_bits);
        load(o.dout, dout_bits);
        if (in.z) load(in.z, z_bits);
        Factors::load(in.B.variable, tile, piece.row, group, d_state, B);
        typename Factors::Load C;
        Factors::load(in.C.variable, tile, piece.row, group, d_state, C);
        float u[kCount];
        float delta[kCount];
        float dy[kCount];
        u_bits.to_floats(in.u.dtype, u);
        delta_bits.to_floats(in.delta.dtype, delta);
        dout_bits.to_floats(o.dout.dtype, dy);
        Factors::store(in.B.variable, tile, B, 0, factors);
        Factors::store(in.C.variable, tile, C, 1, factors);
        if (in.z) {
          float z[kCount];
          z_bits.to_floats(in.z.dtype, z);
#pragma unroll
          for (int e = 0; e < kCount; ++e) dy[e] *= z[e] * sigmoid_fast(z[e]);
        }
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const int row = tile.row(moves.slot_of(e));
          float dt = delta[e] + bias_of(e);
          if (in.softplus) dt = softplus_fast(dt);
          const bool there = row < count;
          cells[row * kCellRow + moves.channel_of(e)] =
              make_float4(there ? dt : 0.0F, there ? dt * u[e] : 0.0F, there ? dy[e] : 0.0F, 0.0F);
        }
      }
      float h[kStates];
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        const int n = lane * kStates + k;
        h[k] = 0.0F;
        if (!mine || n >= d_state) continue;
        if (begin > 0 || piece.part > 0)
          h[k] = o.checkpoints[((piece.checkpoint + begin / kTile - 1) * d_state + n) * in.channels + d];
        else
          h[k] = in.state_before(piece, d, n);
      }
      __syncthreads();

      const int subs = (count + kSub - 1) / kSub;
      store_shared(starts, h);
      for (int sub = 0; sub + 1 < subs; ++sub) {
#pragma unroll
        for (int s = 0; s < kSub; ++s) {
          const int row = sub * kSub + s;
          const float4 cell = cells[row * kCellRow + team];
          float B[kStates];
          load_shared(factors + row * Factors::kRow + lane * kStates, B);
#pragma unroll
          for (int k = 0; k < kStates; ++k) h[k] = fmaf(exp2_fast(cell.x * A[k]), h[k], cell.y * B[k]);
        }
        store_shared(starts + (sub + 1) * kStates * kBlock, h);
      }
      for (int sub = subs - 1; sub >= 0; --sub) {
        load_shared(starts + sub * kStates * kBlock, h);
        float decay[kSub][kStates];
        float before[kSub][kStates];
#pragma unroll
        for (int s = 0; s < kSub; ++s) {
          const int row = sub * kSub + s;
          const float4 cell = cells[row * kCellRow + team];
          float B[kStates];
          load_shared(factors + row * Factors::kRow + lane * kStates, B);
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            decay[s][k] = exp2_fast(cell.x * A[k]);
            before[s][k] = h[k];
            h[k] = fmaf(decay[s][k], h[k], cell.y * B[k]);
          }
        }
        float y[kSub];
        float dinput[kSub];
        float ddt[kSub];
        __syncthreads();  // the shares of the tokens behind these have been summed
#pragma unroll
        for (int s = kSub - 1; s >= 0; --s) {
          const int row = sub * kSub + s;
          const float4 cell = cells[row * kCellRow + team];
          float B[kStates];
          float C[kStates];
          load_shared(factors + row * Factors::kRow + lane * kStates, B);
          load_shared(factors + row * Factors::kRow + Place::kAll + lane * kStates, C);
          float of_b[kStates];
          float of_c[kStates];
          y[s] = dinput[s] = ddt[s] = 0.0F;
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            y[s] = fmaf(C[k], h[k], y[s]);
            of_c[k] = cell.z * h[k];
            g[k] = fmaf(cell.z, C[k], g[k]);
            of_b[k] = g[k] * cell.y;
            dinput[s] = fmaf(g[k], B[k], dinput[s]);
            g[k] *= decay[s][k];
            // Through exp(dt A) h: the gradient of the exponent dt A.
            const float dexponent = g[k] * before[s][k];
            ddt[s] = fmaf(dexponent, A[k], ddt[s]);
            dA[k] = fmaf(dexponent, cell.x, dA[k]);
            h[k] = before[s][k];
          }
          float* const share = shares + s * Place::kShare + threadIdx.x * kStates;
          store_shared(share, of_b);
          store_shared(share + kSub * Place::kShare, of_c);
        }
        // These lanes alone read the cells of their channel, and they have.
        const auto cell_of = [&](int s) { return &cells[(sub * kSub + s) * kCellRow + team]; };
        sum_over_lanes<kLanes>(y, [&](int s, float sum) { cell_of(s)->y = sum; });
        sum_over_lanes<kLanes>(dinput, [&](int s, float sum) { cell_of(s)->z = sum; });
        sum_over_lanes<kLanes>(ddt, [&](int s, float sum) { cell_of(s)->w = kLn2 * sum; });
        __syncthreads();

        // Over the channels of the block, four states at a time; where that leaves threads without work, two
        // of them or more share the channels of a sum.
        constexpr int kQuads = Place::kAll / 4;
        constexpr int kSums = 2 * kSub * kQuads;
        constexpr int kParts = kSums < kBlock ? kBlock / kSums : 1;
        for (int i = static_cast<int>(threadIdx.x); i < kSums * kParts; i += kBlock) {
          const int quad = i % kQuads;
          const int part = i / kQuads % kParts;
          const int s = i / (kQuads * kParts) % kSub;
          const int which = i / (kQuads * kParts * kSub);
          float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
          const float* const from = shares + (which * kSub + s) * Place::kShare + quad * 4;
#pragma unroll
          for (int c = part; c < kChannels; c += kParts) {
            const float4 v = *reinterpret_cast<const float4*>(from + c * Place::kAll);
            sum.x += v.x;
            sum.y += v.y;
            sum.z += v.z;
            sum.w += v.w;
          }
          for (int step = kQuads * kParts / 2; step >= kQuads; step /= 2) {
            sum.x += __shfl_xor_sync(0xffffffffU, sum.x, step);
            sum.y += __shfl_xor_sync(0xffffffffU, sum.y, step);
            sum.z += __shfl_xor_sync(0xffffffffU, sum.z, step);
            sum.w += __shfl_xor_sync(0xffffffffU, sum.w, step);
          }
          float* const sums = which == 0 ? o.dB : o.dC;
          const int row = sub * kSub + s;
          if (sums == nullptr || part != 0 || row >= count) continue;
          const std::int64_t t = tile.position(tile.row(row));
          float* const at = sums +
                            (((block * in.rows + piece.row) * o.length + t) * in.groups + group) * d_state +
                            quad * 4;
          const float values[4] = {sum.x, sum.y, sum.z, sum.w};
          if (quad * 4 + 4 <= d_state && d_state % 4 == 0) {
            *reinterpret_cast<float4*>(at) = sum;
          } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
              if (quad * 4 + j < d_state) at[j] = values[j];
          }
        }
      }

      Elements u_bits;
      Elements delta_bits;
      Elements dout_bits;
      Elements z_bits = {};
      load(in.u, u_bits);
      load(in.delta, delta_bits);
      load(o.dout, dout_bits);
      if (in.z) load(in.z, z_bits);
      float u[kCount];
      float dy[kCount];
      float z[kCount];
      float delta[kCount];
      u_bits.to_floats(in.u.dtype, u);
      delta_bits.to_floats(in.delta.dtype, delta);
      dout_bits.to_floats(o.dout.dtype, dy);
      z_bits.to_floats(in.z.dtype, z);
      float du[kCount];
      float ddelta[kCount];
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const int c = moves.channel_of(e);
        const int row = tile.row(moves.slot_of(e));
        const float skip = in.D && c < channels ? in.D.load(first + c) : 0.0F;
        const float4 cell = cells[row * kCellRow + c];
        const float out = fmaf(skip, u[e], cell.y);
        const float dout = dy[e];
        if (in.z) {
          const float gate = sigmoid_fast(z[e]);
          dy[e] = dout * (z[e] * gate);
          z[e] = dout * out * gate * (1.0F + z[e] * (1.0F - gate));
        }
        du[e] = fmaf(cell.z, cell.x, skip * dy[e]);
        const float raw = delta[e] + bias_of(e);
        const float slope = in.softplus && raw <= 20.0F ? sigmoid_fast(raw) : 1.0F;
        ddelta[e] = fmaf(cell.z, u[e], cell.w) * slope;
        if (row < count && c < channels) {
          float* const sums = total(e);
          sums[0] = fmaf(dy[e], u[e], sums[0]);
          sums[Place::kTotal] += ddelta[e];
        }
      }
      const auto store = [&](const AnyView<3>& view, const float(&from)[kCount]) {
        if (view) store_span(view.data, view.dtype, moves.span(view, tile, piece.row, first, channels), from);
      };
      store(o.du, du);
      store(o.ddelta, ddelta);
      store(o.dz, z);
      __syncthreads();  // cells and factors are free for the next tile
    }

#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      const int n = lane * kStates + k;
      if (!mine || n >= d_state) continue;
      if (o.dA != nullptr) o.dA[(piece_index * d_state + n) * in.channels + d] = dA[k];
      if (o.dinitial_state && piece.first) o.dinitial_state.set(g[k], piece.sequence, d, n);
    }
    __syncthreads();
    for (int which = 0; which < 2; ++which) {
      float* const to = which == 0 ? o.dD : o.ddelta_bias;
      if (const int c = static_cast<int>(threadIdx.x); to != nullptr && c < channels) {
        float sum = 0.0F;
        for (int slot = 0; slot < kTile; ++slot)
          sum += shared[Place::kTotals + which * Place::kTotal + slot * kCellRow + c];
        to[piece_index * in.channels + first + c] = sum;
      }
    }
  }
}

template <int kLanes, int kStates>
void launch_tiles(Context& ctx, const Operands& o) {
  const std::int64_t blocks = (o.in.channels / o.in.groups + kBlock / kLanes - 1) / (kBlock / kLanes);
  const std::int64_t items = o.pieces.count * o.in.groups * blocks;
  cuda::launch(ctx, "selective_scan_backward", unwind_tiles<kLanes, kStates>,
               dim3(static_cast<unsigned>(std::min<std::int64_t>(items, 1 << 30))), dim3(kBlock),
               sizeof(float) * Layout<kLanes, kStates>::kFloats, o);
}

}  // namespace

bool run_fast_backward(Context& ctx, const Problem& p, const Gradients& given) {
  if (!fits_tiles(p)) return false;
  Gradients gradients = given;
  if (!gradients.checkpoints) {
    Problem states = p;
    states.out = states.last_state = {};
    states.checkpoints = ctx.empty({count_checkpoints(p.runs), p.d_state, p.channels});
    if (states.checkpoints.numel() > 0) run_fast_forward(ctx, states);
    gradients.checkpoints = states.checkpoints;
  }
  // With more lanes a channel, blocks have fewer channels, and more of them leave sums behind: half as many
  // blocks as in the forward do.
  const LanePlan plan = choose_lanes(std::ssize(p.runs.runs), p.groups, p.channels / p.groups, p.u.size(2),
                                     p.d_state, cuda::limits_of(ctx).multiprocessors / 2);
  const UploadedPieces uploaded = upload_pieces(ctx, p, kWholeRuns);
  const std::int64_t in_block = kBlock / plan.lanes;
  const PartialSums sums =
      make_sums(ctx, p, gradients, (p.channels / p.groups + in_block - 1) / in_block, uploaded.pieces.count);
  if (uploaded.pieces.count * p.channels > 0) {
    const Operands o(p, gradients, sums, uploaded.pieces);
    switch (plan.lanes * 16 + plan.states) {
      case 4 * 16 + 4: launch_tiles<4, 4>(ctx, o); break;
      case 8 * 16 + 2: launch_tiles<8, 2>(ctx, o); break;
      case 16 * 16 + 1: launch_tiles<16, 1>(ctx, o); break;
      case 8 * 16 + 4: launch_tiles<8, 4>(ctx, o); break;
      case 16 * 16 + 4: launch_tiles<16, 4>(ctx, o); break;
      default: launch_tiles<32, 8>(ctx, o); break;
    }
  }
  finish_sums(ctx, p, gradients, sums);
  return true;
}

}  // namespace krait::scan
