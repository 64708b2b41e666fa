// The chunked algorithm on tensor cores. A block walks the chunks of one
// segment, for one head and 64 of its channels, with the state in f32 in the
// registers that its product accumulates in. A chunk of 64 tokens is
//   y_i = exp(a_i) S C_i + sum over j <= i of (C_i . B_j) exp(a_i - a_j) d_j
//   x_j S  <- exp(a_63) S + sum over j of exp(a_63 - a_j) d_j x_j B_j^T
// with a the sum of the exponents d A from the chunk's first token on. Rounded
// to 16 bits are: the state as operand of S C, the masked matrix, and d x with
// its factor.
#include <type_traits>

#include "ops/ssd/cuda/chunks.cuh"

namespace krait::ssd_detail {
namespace {

constexpr int kThreads = 128;

// Bytes from the begin of dynamic shared memory.
template <int kN>
struct Layout {
  static constexpr int kRowsOfN = kTokens * kN * 2;
  static constexpr int kRowsOfP = kTokens * kChannels * 2;
  static constexpr int x = 0;
  static constexpr int B = x + kRowsOfP;
  static constexpr int C = B + kRowsOfN;
  static constexpr int S = C + kRowsOfN;  // (channels, N), the state before the chunk
  static constexpr int y = S + kChannels * kN * 2;
  static constexpr int steps = y + kRowsOfP;
  static constexpr int skip = steps + static_cast<int>(sizeof(Steps));  // D of the channels
  static constexpr int total = skip + kChannels * static_cast<int>(sizeof(float));
};

template <typename T, int kN>
__global__ void __launch_bounds__(kThreads, kN > 64 ? 2 : 3)
    chunked_kernel(Inputs in, Segments segments, const float* starts, AnyView<4> out,
                   AnyView<4> final_states) {
  using At = Layout<kN>;
  extern __shared__ __align__(1024) float4 shared_memory[];
  char* const memory = reinterpret_cast<char*>(shared_memory);
  const unsigned shared = shared_address(shared_memory);
  Steps& steps = *reinterpret_cast<Steps*>(memory + At::steps);
  float* const skip = reinterpret_cast<float*>(memory + At::skip);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int row = lane / 4;         // of a fragment of sums, and 8 more
  const int column = lane % 4 * 2;  // and the next

  const std::int64_t tiles = in.headdim / kChannels;
  const std::int64_t s = blockIdx.x / (in.heads * tiles);
  const std::int64_t head = blockIdx.x / tiles % in.heads;
  const std::int64_t channel0 = blockIdx.x % tiles * kChannels;
  const Segment segment = segments.at(s);
  const std::int64_t group = head / in.heads_per_group;
  const T* x = static_cast<const T*>(in.x.data) + in.x.offset(segment.row, 0, head, channel0);
  const T* B = static_cast<const T*>(in.B.data) + in.B.offset(segment.row, 0, group, 0);
  const T* C = static_cast<const T*>(in.C.data) + in.C.offset(segment.row, 0, group, 0);
  const T* z =
      in.z ? static_cast<const T*>(in.z.data) + in.z.offset(segment.row, 0, head, channel0) : nullptr;
  T* to = static_cast<T*>(out.data) + out.offset(segment.row, 0, head, channel0);
  const float bias = bias_of(in, head);
  const float rate = rate_of(in, head);

  const auto load = [&](int begin) {
    load_tile<kChannels, kThreads>(shared + At::x, x, in.x.stride[1], kChannels, segments, segment, begin);
    load_tile<kN, kThreads>(shared + At::B, B, in.B.stride[1], in.d_state, segments, segment, begin);
    load_tile<kN, kThreads>(shared + At::C, C, in.C.stride[1], in.d_state, segments, segment, begin);
  };
  float dt[2] = {};

  float S[kN / 8][4] = {};
  static_assert(At::S - At::B == kChannels * kN * static_cast<int>(sizeof(float)));
  float* const state_tile = reinterpret_cast<float*>(memory + At::B);
  bool carries = false;
  if (starts != nullptr) {
    carries = true;
    const float* from = starts + ((s * in.heads + head) * in.headdim + channel0) * in.d_state;
    read_state<kN>(state_tile, in.d_state, S, [&](int p, int n, float& v) { v = from[p * in.d_state + n]; });
  } else if (segment.initial && in.initial) {
    carries = true;
    read_state<kN>(state_tile, in.d_state, S, [&](int p, int n, float& v) {
      v = in.initial.load(segment.sequence, head, channel0 + p, n);
    });
  }
  const auto store_operand = [&] {
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const unsigned at = pair_offset<kN>(warp * 16 + row + k * 4, n, column);
        *reinterpret_cast<unsigned*>(memory + At::S + at) = pack<T>(S[n][k], S[n][k + 1]);
      }
    }
  };

  const int count = static_cast<int>(segment.count);
  const bool wants_state = segment.final && final_states;
  if (count > 0) {
    if (warp == 0) load_dt(in, segments, segment, head, 0, lane, dt);
    load(0);
  }
  if (carries) store_operand();
  if (thread < kChannels) skip[thread] = in.D ? in.D.load(head, channel0 + thread) : 0.0F;
  // The rows of the later strips have more of the masked matrix; blocks begin with different ones.
  const int strip = (warp + static_cast<int>(blockIdx.x)) % 4;
  const int token = strip * 16 + row;  // of the lane's sums, and 8 more

  for (int begin = 0; begin < count; begin += kTokens) {
    const bool more = begin + kTokens < count;
    if (warp == 0) compute_steps(in, dt, bias, rate, count - begin, lane, steps);
    wait_for_copies();
    __syncthreads();
    if (more && warp == 0) load_dt(in, segments, segment, head, begin + kTokens, lane, dt);

    {
      float y[kChannels / 8][4] = {};
      if (carries) {
#pragma unroll
        for (int k = 0; k < kN / 8; k += 2) {
          unsigned c[4];
          load_a<kN>(c, shared + At::C, strip * 16, k);
#pragma unroll
          for (int p = 0; p < kChannels / 16; ++p) {
            unsigned b[4];
            load_b_transposed<kN>(b, shared + At::S, p * 16, k);
            multiply_add<T>(y[2 * p], c, b[0], b[1]);
            multiply_add<T>(y[2 * p + 1], c, b[2], b[3]);
          }
        }
        const float from_start[2] = {steps.start[token], steps.start[token + 8]};
#pragma unroll
        for (int p = 0; p < kChannels / 8; ++p) {
#pragma unroll
          for (int k = 0; k < 4; ++k) y[p][k] *= from_start[k / 2];
        }
      }

      const float a[2] = {steps.a[token], steps.a[token + 8]};
      // Two strips of columns at a time, which all of C's fragments are read for.
#pragma unroll
      for (int j0 = 0; j0 < kTokens / 16; j0 += 2) {
        if (j0 > strip) continue;
        float cb[4][4] = {};
#pragma unroll
        for (int k = 0; k < kN / 8; k += 2) {
          unsigned c[4];
          load_a<kN>(c, shared + At::C, strip * 16, k);
#pragma unroll
          for (int j = j0; j < j0 + 2; ++j) {
            if (j > strip) continue;
            unsigned b[4];
            load_b_transposed<kN>(b, shared + At::B, j * 16, k);
            multiply_add<T>(cb[2 * (j - j0)], c, b[0], b[1]);
            multiply_add<T>(cb[2 * (j - j0) + 1], c, b[2], b[3]);
          }
        }
#pragma unroll
        for (int j = j0; j < j0 + 2; ++j) {
          if (j > strip) continue;
          unsigned m[4];  // of the masked matrix, as left operand
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int other = j * 16 + half * 8 + column;
            const float2 a_other = *reinterpret_cast<const float2*>(&steps.a[other]);
            const float2 d_other = *reinterpret_cast<const float2*>(&steps.d[other]);
            float v[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const float weight = exp2_fast(a[k / 2] - (k % 2 == 0 ? a_other.x : a_other.y));
              const float value =
                  cb[2 * (j - j0) + half][k] * (weight * (k % 2 == 0 ? d_other.x : d_other.y));
              v[k] = j < strip || other + k % 2 <= token + k / 2 * 8 ? value : 0.0F;
            }
            m[2 * half] = pack<T>(v[0], v[1]);
            m[2 * half + 1] = pack<T>(v[2], v[3]);
          }
#pragma unroll
          for (int p = 0; p < kChannels / 16; ++p) {
            unsigned b[4];
            load_b<kChannels>(b, shared + At::x, j * 16, 2 * p);
            multiply_add<T>(y[2 * p], m, b[0], b[1]);
            multiply_add<T>(y[2 * p + 1], m, b[2], b[3]);
          }
        }
      }

      // Through shared memory, rows of the warp's own, to stores of 16 bytes.
      char* const y_tile = memory + At::y;
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const int t = token + k * 4;
        const bool gated = z != nullptr && begin + t < count;
        const T* z_row =
            gated ? z + segments.position(segment, begin + t) * in.z.stride[1] + column : nullptr;
#pragma unroll
        for (int p = 0; p < kChannels / 8; ++p) {
          const unsigned at = pair_offset<kChannels>(t, p, column);
          const float2 in_x = unpack<T>(*reinterpret_cast<const unsigned*>(memory + At::x + at));
          float low = fmaf(skip[p * 8 + column], in_x.x, y[p][k]);
          float high = fmaf(skip[p * 8 + column + 1], in_x.y, y[p][k + 1]);
          if (gated) {
            const float2 gate = unpack<T>(*reinterpret_cast<const unsigned*>(z_row + p * 8));
            low *= silu_fast(gate.x);
            high *= silu_fast(gate.y);
          }
          *reinterpret_cast<unsigned*>(y_tile + at) = pack<T>(low, high);
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = strip * 16 + i * 4 + lane / 8;
        if (begin + t >= count) continue;
        *reinterpret_cast<uint4*>(to + segments.position(segment, begin + t) * out.stride[1] + lane % 8 * 8) =
            *reinterpret_cast<const uint4*>(y_tile + tile_offset<kChannels>(t, lane % 8));
      }
    }

    if (more || wants_state) {
      const float decay = exp2_fast(steps.a[kTokens - 1]);
#pragma unroll
      for (int n = 0; n < kN / 8; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) S[n][k] *= decay;
      }
#pragma unroll
      for (int j = 0; j < kTokens / 16; ++j) {
        unsigned u[4];  // (d x)^T with what the end has of each token
        load_a_transposed<kChannels>(u, shared + At::x, j * 16, warp * 2);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 factor = *reinterpret_cast<const float2*>(&steps.left[j * 16 + k / 2 * 8 + column]);
          const float2 v = unpack<T>(u[k]);
          u[k] = pack<T>(v.x * factor.x, v.y * factor.y);
        }
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
          unsigned b[4];
          load_b<kN>(b, shared + At::B, j * 16, 2 * n);
          multiply_add<T>(S[2 * n], u, b[0], b[1]);
          multiply_add<T>(S[2 * n + 1], u, b[2], b[3]);
        }
      }
      carries = true;
    }
    __syncthreads();  // the tiles and steps are free
    if (more) {
      load(begin + kTokens);
      store_operand();
    }
  }
  if (wants_state)
    write_state<kN>(state_tile, in.d_state, S, [&](int p, int n, float v) {
      final_states.store(v, segment.sequence, head, channel0 + p, n);
    });
}

}  // namespace

void chunked_outputs(Context& ctx, const Inputs& in, const Segments& segments, const Tensor& starts,
                     const Problem& p) {
  const std::int64_t blocks = segments.count * in.heads * (in.headdim / kChannels);
  if (blocks == 0) return;
  cuda::dispatch_element(in.x.dtype, "[ssd] x", [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      const auto with = [&](auto kernel, int shared) {
        cuda::launch(ctx, "ssd chunks", kernel, static_cast<unsigned>(blocks), kThreads,
                     static_cast<std::size_t>(shared), in, segments, starts ? starts.data<float>() : nullptr,
                     AnyView<4>(p.out), AnyView<4>(p.final_states));
      };
      if (in.d_state <= 64)
        with(chunked_kernel<T, 64>, Layout<64>::total);
      else
        with(chunked_kernel<T, 128>, Layout<128>::total);
    }
  });
}

}  // namespace krait::ssd_detail
