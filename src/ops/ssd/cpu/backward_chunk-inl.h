// The backward of one head over one chunk, in matrix products. x, dy and what is derived from them are held
// transposed, channels by tokens: the factors of the tokens are then vectors, sums over channels stay in
// lanes, and every product finds its second operand by rows. Included once for each SIMD target.
#if defined(KRAIT_OPS_SSD_CPU_BACKWARD_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KRAIT_OPS_SSD_CPU_BACKWARD_CHUNK_INL_H_
#undef KRAIT_OPS_SSD_CPU_BACKWARD_CHUNK_INL_H_
#else
#define KRAIT_OPS_SSD_CPU_BACKWARD_CHUNK_INL_H_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cstdint>

#include "core/simd/gemm-inl.h"
#include "ops/ssd/cpu/backward_layout.h"
#include "ops/ssd/cpu/tokens-inl.h"

HWY_BEFORE_NAMESPACE();
namespace krait::ssd_detail::HWY_NAMESPACE {
namespace g = krait::HWY_NAMESPACE::gemm_detail;

// The first operand of a product: element (i, k) is data[i * strides.row + k * strides.step].
struct Operand {
  const float* data;
  g::PanelStrides strides;
};
HWY_INLINE Operand by_rows(const float* data, std::int64_t stride) { return {data, {stride, 1}}; }
HWY_INLINE Operand transposed(const float* data, std::int64_t stride) { return {data, {1, stride}}; }

// c (rows, columns) = or += a (rows, depth) b (depth, columns), in whole tiles: what they cover beyond the
// edges is read and written too.
inline void multiply(const Operand& a, const float* b, std::int64_t b_stride, std::int64_t depth, float* c,
                     std::int64_t c_stride, std::int64_t rows, std::int64_t columns, bool add) {
  // Columns come outermost: a panel of b stays in the first-level cache.
  for (std::int64_t j = 0; j < columns; j += g::kTileColumns)
    for (std::int64_t i = 0; i < rows; i += g::kTileRows)
      g::multiply_tile(a.data + i * a.strides.row, a.strides, b + j, depth,
                       Strided<float>{c + i * c_stride + j, c_stride, 1}, g::kTileRows, g::kTileColumns, add,
                       b_stride);
}

// Columns that a transposing copy takes together: it reads a part of a cache line of each and comes back for
// the rest.
inline constexpr std::int64_t kStrip = 16;

// to (columns, rows) = the transpose of `from` (rows, columns).
inline void transpose(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                      float* to, std::int64_t to_stride) {
  for (std::int64_t i = 0; i < rows; i += kStrip)
    krait::HWY_NAMESPACE::load_tile(from + i * from_stride, 1, from_stride, columns,
                                    std::min(kStrip, rows - i), to + i, to_stride);
}

// Calls body(first, offset, step, count) for stretches of equally spaced tokens of t[row, :, head, :], as
// for_each_stretch does, but few tokens at a time.
template <typename Body>
HWY_INLINE void for_each_strip(const Problem& p, const Chunk& chunk, const Tensor& t, std::int64_t head,
                               const Body& body) {
  for_each_stretch(p, chunk,
                   [&](std::int64_t first, std::int64_t position, std::int64_t step, std::int64_t count) {
                     const std::int64_t offset =
                         chunk.run->row * t.stride(0) + position * t.stride(1) + head * t.stride(2);
                     step *= t.stride(1);
                     for (std::int64_t i = 0; i < count; i += kStrip)
                       body(first + i, offset + i * step, step, std::min(kStrip, count - i));
                   });
}

// Row q of `to` = t[row, tokens of the chunk, head, q], and 0 up to a whole vector.
inline void load_channels(const Problem& p, const Chunk& chunk, const Tensor& t, std::int64_t head, float* to,
                          std::int64_t to_stride) {
  const std::int64_t channels = t.size(3);
  for_each_strip(p, chunk, t, head,
                 [&](std::int64_t first, std::int64_t offset, std::int64_t step, std::int64_t count) {
                   krait::HWY_NAMESPACE::load_tile(t.dtype(), t.raw(), offset, t.stride(3), step, channels,
                                                   count, to + first, to_stride);
                 });
  const std::int64_t rest = (g::kLanes - chunk.tokens % g::kLanes) % g::kLanes;
  for (std::int64_t q = 0; q < channels; ++q) std::fill_n(to + q * to_stride + chunk.tokens, rest, 0.0F);
}

inline void store_channels(const Problem& p, const Chunk& chunk, const float* from, std::int64_t from_stride,
                           const Tensor& t, std::int64_t head) {
  for_each_strip(p, chunk, t, head,
                 [&](std::int64_t first, std::int64_t offset, std::int64_t step, std::int64_t count) {
                   krait::HWY_NAMESPACE::store_tile(from + first, from_stride, t.dtype(), t.raw(), offset,
                                                    t.stride(3), step, t.size(3), count);
                 });
}

// Calls body(offset into the row, offset into the matrix) for each vector of a (P, tokens) matrix, row by
// row.
template <typename Body>
HWY_INLINE void for_each_vector(std::int64_t channels, std::int64_t tokens, std::int64_t stride,
                                const Body& body) {
  for (std::int64_t q = 0; q < channels; ++q)
    for (std::int64_t j = 0; j < tokens; j += g::kLanes) body(j, q * stride + j);
}

// to (P, tokens) = from times the factor of each token.
inline void scale_tokens(const Problem& p, const BackwardLayout& at, std::int64_t tokens, const float* from,
                         const float* factors, float* to) {
  const hn::ScalableTag<float> df;
  for_each_vector(p.headdim(), tokens, at.token_stride, [&](std::int64_t j, std::int64_t k) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(df, factors + j), hn::LoadU(df, from + k)), df, to + k);
  });
}

// Rows [begin, end) of c = a b up to their diagonals, by whole tiles. `a` and `c` start at row `begin`.
inline void multiply_lower(const Operand& a, const float* b, std::int64_t b_stride, std::int64_t depth,
                           float* c, std::int64_t c_stride, std::int64_t begin, std::int64_t end) {
  for (std::int64_t j = 0; j < end; j += g::kTileColumns) {
    const std::int64_t above = std::max<std::int64_t>(j - begin, 0) / g::kTileRows * g::kTileRows;
    multiply({a.data + above * a.strides.row, a.strides}, b + j, b_stride, depth, c + above * c_stride + j,
             c_stride, end - begin - above, g::kTileColumns, false);
  }
}

// B and C of the chunk, the transposes that the heads need, and C B^T.
inline void load_group(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk,
                       std::int64_t group, float* HWY_RESTRICT w) {
  const Problem& p = b.forward;
  const std::int64_t d_state = p.d_state();
  load_tokens(p, chunk, p.B, group, w + at.B, at.state_stride);
  load_tokens(p, chunk, p.C, group, w + at.C, at.state_stride);
  transpose(w + at.B, at.state_stride, chunk.tokens, d_state, w + at.Bt, at.token_stride);
  if (b.dz) transpose(w + at.C, at.state_stride, chunk.tokens, d_state, w + at.Ct, at.token_stride);
  multiply_lower(by_rows(w + at.C, at.state_stride), w + at.Bt, at.token_stride, d_state, w + at.CB,
                 at.token_stride, 0, chunk.tokens);
}

// x^T and the factors of the steps. Returns exp(a_last).
inline float load_inputs(const Problem& p, const BackwardLayout& at, const Chunk& chunk, std::int64_t head,
                         float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  load_channels(p, chunk, p.x, head, w + at.x, at.token_stride);
  load_raw_steps(p, chunk, head, w + at.raw);
  discretize_steps(p, chunk.tokens, head, w + at.raw, w + at.d, w + at.exponent);
  sum_exponents(chunk.tokens, w + at.exponent, w + at.high, w + at.low);
  const float decay = decays_to_end(chunk.tokens, w + at.high, w + at.low, w + at.to_end);
  for (std::int64_t j = 0; j < chunk.tokens; j += g::kLanes)
    hn::StoreU(hn::Mul(hn::LoadU(df, w + at.d + j), hn::LoadU(df, w + at.to_end + j)), df, w + at.left + j);
  return decay;
}

// dy = dout, or dout silu(z). Leaves in `gate` what y has to be multiplied with for dz.
inline void load_output_gradient(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk,
                                 std::int64_t head, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const Problem& p = b.forward;
  load_channels(p, chunk, b.dout, head, w + at.dy, at.token_stride);
  if (!p.z) return;
  load_channels(p, chunk, p.z, head, w + at.gate, at.token_stride);
  for_each_vector(p.headdim(), chunk.tokens, at.token_stride, [&](std::int64_t, std::int64_t k) HWY_ATTR {
    const auto dout = hn::LoadU(df, w + at.dy + k);
    const auto z = hn::LoadU(df, w + at.gate + k);
    const auto one = hn::Set(df, 1.0F);
    const auto sigmoid = krait::HWY_NAMESPACE::sigmoid(df, z);
    const auto slope = hn::Mul(sigmoid, hn::MulAdd(z, hn::Sub(one, sigmoid), one));
    hn::StoreU(hn::Mul(dout, hn::Mul(z, sigmoid)), df, w + at.dy + k);
    hn::StoreU(hn::Mul(dout, slope), df, w + at.gate + k);
  });
}

// What the chunk's tokens have put into the state after it, by the gradient dS of that state:
//   dx (the gradient by d x) = exp(a_last - a_j) dS B_j,  dB += exp(a_last - a_j) dS^T d_j x_j,
// and `ends`, the gradient by the exponent a_last - a_j.
inline void gradient_through_end(const BackwardProblem& b, const BackwardLayout& at, std::int64_t tokens,
                                 const float* HWY_RESTRICT dS, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const Problem& p = b.forward;
  const std::int64_t stride = at.token_stride;
  if (b.dB) {
    scale_tokens(p, at, tokens, w + at.x, w + at.left, w + at.scaled);
    multiply(transposed(w + at.scaled, stride), dS, at.state_stride, p.headdim(), w + at.dB, at.state_stride,
             tokens, p.d_state(), true);
  }
  multiply(by_rows(dS, at.state_stride), w + at.Bt, stride, p.d_state(), w + at.dx, stride, p.headdim(),
           tokens, false);
  for_each_vector(p.headdim(), tokens, stride, [&](std::int64_t j, std::int64_t k) HWY_ATTR {
    const auto v = hn::Mul(hn::LoadU(df, w + at.to_end + j), hn::LoadU(df, w + at.dx + k));
    hn::StoreU(v, df, w + at.dx + k);
    hn::StoreU(hn::MulAdd(hn::LoadU(df, w + at.x + k), v, hn::LoadU(df, w + at.ends + j)), df,
               w + at.ends + j);
  });
  for (std::int64_t j = 0; j < tokens; j += g::kLanes)
    hn::StoreU(hn::Mul(hn::LoadU(df, w + at.d + j), hn::LoadU(df, w + at.ends + j)), df, w + at.ends + j);
}

// The pairs j <= i of the tokens i in [begin, end). With E_ij = exp(a_i - a_j) and dM_ij = dy_i . x_j:
//   M = CB E;  G += dM E d_j, the gradient by CB;  W = dM E d_j CB, the gradient by the exponent a_i - a_j.
// The exponent of token t takes part in the pairs i >= t > j. Rows are walked from the last one, so that
// what the columns have added up is what those pairs need: no difference of large sums is taken.
inline void weigh_pairs(const BackwardLayout& at, std::int64_t begin, std::int64_t end,
                        float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  for (std::int64_t i = end - 1; i >= begin; --i) {
    const float* HWY_RESTRICT cb = w + at.CB + i * at.token_stride;
    const float* HWY_RESTRICT dm = w + at.dM + (i - begin) * at.token_stride;
    float* HWY_RESTRICT m = w + at.M + (i - begin) * at.token_stride;
    float* HWY_RESTRICT dcb = w + at.G + i * at.token_stride;
    float* HWY_RESTRICT columns = w + at.column_sums;
    const auto high = hn::Set(df, w[at.high + i]);
    const auto low = hn::Set(df, w[at.low + i]);
    auto sum = hn::Zero(df);
    // What lies beyond the diagonal is dropped, not multiplied by 0: it may be anything.
    const auto pairs = [&](std::int64_t j, auto upto, auto below) HWY_ATTR {
      const auto e = decay_between(high, low, w + at.high + j, w + at.low + j);
      const auto product = hn::LoadU(df, cb + j);
      hn::StoreU(upto(hn::Mul(product, e)), df, m + j);
      const auto t = upto(hn::Mul(hn::Mul(hn::LoadU(df, dm + j), e), hn::LoadU(df, w + at.d + j)));
      hn::StoreU(hn::Add(hn::LoadU(df, dcb + j), t), df, dcb + j);
      const auto column = below(hn::MulAdd(t, product, hn::LoadU(df, columns + j)));
      hn::StoreU(column, df, columns + j);
      sum = hn::Add(sum, column);
    };
    std::int64_t j = 0;
    const auto all = [](auto v) HWY_ATTR { return v; };
    for (; j + g::kLanes <= i; j += g::kLanes) pairs(j, all, all);
    const auto column = hn::Iota(df, static_cast<float>(j));
    const auto diagonal = hn::Set(df, static_cast<float>(i));
    pairs(
        j, [&](auto v) HWY_ATTR { return hn::IfThenElseZero(hn::Le(column, diagonal), v); },
        [&](auto v) HWY_ATTR { return hn::IfThenElseZero(hn::Lt(column, diagonal), v); });
    // The rest of the tile is read too.
    for (j += g::kLanes; j % g::kTileColumns != 0; j += g::kLanes) hn::StoreU(hn::Zero(df), df, m + j);
    w[at.exponent + i] = hn::GetLane(hn::SumOfLanes(df, sum));
  }
}

// What tokens of the chunk say to each other: dx += M^T dy, y += M d x where dz is wanted, and the gradients
// by C B^T and by the exponents. A strip of rows of the pairs at a time, which stays in the second-level
// cache. `flows`: dx has a part already; `carries`: y has.
inline void gradient_of_pairs(const BackwardProblem& b, const BackwardLayout& at, std::int64_t tokens,
                              bool flows, bool carries, float* HWY_RESTRICT w) {
  static_assert(kPairRows % g::kTileColumns == 0);
  const Problem& p = b.forward;
  const std::int64_t stride = at.token_stride;
  const bool inputs = b.dx || b.steps();
  const bool weights = b.dB || b.dC || b.steps();
  std::fill_n(w + at.column_sums, stride, 0.0F);
  if (b.dz) scale_tokens(p, at, tokens, w + at.x, w + at.d, w + at.scaled);
  for (std::int64_t end = tokens; end > 0;) {
    const std::int64_t begin = (end - 1) / kPairRows * kPairRows;
    if (weights)
      multiply_lower(transposed(w + at.dy + begin, stride), w + at.x, stride, p.headdim(), w + at.dM, stride,
                     begin, end);
    weigh_pairs(at, begin, end, w);
    // M is 0 above its diagonal: a panel of its columns starts there, or at the strip.
    for (std::int64_t j = 0; inputs && j < end; j += g::kTileColumns) {
      const std::int64_t i = std::max(begin, j);
      multiply(by_rows(w + at.dy + i, stride), w + at.M + (i - begin) * stride + j, stride, end - i,
               w + at.dx + j, stride, p.headdim(), g::kTileColumns, flows || end < tokens);
    }
    if (b.dz) {
      transpose(w + at.M, stride, end - begin, end, w + at.Mt, at.pair_stride);
      for (std::int64_t i = begin; i < end; i += g::kTileColumns)
        multiply(by_rows(w + at.scaled, stride), w + at.Mt + (i - begin), at.pair_stride,
                 std::min<std::int64_t>(i + g::kTileColumns, end), w + at.y + i, stride, p.headdim(),
                 g::kTileColumns, carries);
    }
    end = begin;
  }
}

// dC += the part that comes through the state before the chunk, S: exp(a_i) S^T dy_i, of which `scaled` holds
// exp(a_i) dy_i. `off`: the gradient by the exponent a_i of that part.
inline void gradient_of_C(const Problem& p, const BackwardLayout& at, std::int64_t tokens,
                          const float* HWY_RESTRICT S, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  for (std::int64_t begin = 0; begin < tokens; begin += kStateRows) {
    const std::int64_t rows = std::min(kStateRows, tokens - begin);
    multiply(transposed(w + at.scaled + begin, at.token_stride), S, at.state_stride, p.headdim(),
             w + at.dC_head, at.state_stride, rows, p.d_state(), false);
    for (std::int64_t i = 0; i < rows; ++i) {
      const float* HWY_RESTRICT part = w + at.dC_head + i * at.state_stride;
      const float* HWY_RESTRICT C = w + at.C + (begin + i) * at.state_stride;
      float* HWY_RESTRICT dC = w + at.dC + (begin + i) * at.state_stride;
      auto sum = hn::Zero(df);
      // Columns beyond N are 0 in C.
      for (std::int64_t n = 0; n < p.d_state(); n += g::kLanes) {
        const auto v = hn::LoadU(df, part + n);
        sum = hn::MulAdd(v, hn::LoadU(df, C + n), sum);
        hn::StoreU(hn::Add(hn::LoadU(df, dC + n), v), df, dC + n);
      }
      w[at.off + begin + i] = hn::GetLane(hn::SumOfLanes(df, sum));
    }
  }
}

// <dS, S>, and dS *= decay.
inline double decay_state_gradient(const Problem& p, const BackwardLayout& at, const float* HWY_RESTRICT S,
                                   float decay, float* HWY_RESTRICT dS) {
  const hn::ScalableTag<float> df;
  const auto factor = hn::Set(df, decay);
  double product = 0.0;
  for (std::int64_t q = 0; q < p.headdim(); ++q, dS += at.state_stride) {
    auto sum = hn::Zero(df);
    for (std::int64_t n = 0; n < p.d_state(); n += g::kLanes) {
      const auto v = hn::LoadU(df, dS + n);
      if (S != nullptr) sum = hn::MulAdd(v, hn::LoadU(df, S + q * at.state_stride + n), sum);
      hn::StoreU(hn::Mul(factor, v), df, dS + n);
    }
    product += static_cast<double>(hn::GetLane(hn::SumOfLanes(df, sum)));
  }
  return product;
}

// From the gradient by d x: dx = d (that) + D dy in its place, dd_j = x_j . (that), and the gradient by D.
inline void finish_inputs(const BackwardProblem& b, const BackwardLayout& at, std::int64_t tokens,
                          std::int64_t head, float* HWY_RESTRICT dD, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const Problem& p = b.forward;
  std::fill_n(w + at.dd, at.token_stride, 0.0F);
  for (std::int64_t q = 0; q < p.headdim(); ++q) {
    const auto skip = hn::Set(df, p.D ? p.D.data<float>()[head * p.headdim() + q] : 0.0F);
    auto sum = hn::Zero(df);
    for (std::int64_t j = 0, k = q * at.token_stride; j < tokens; j += g::kLanes, k += g::kLanes) {
      const auto x = hn::LoadU(df, w + at.x + k);
      const auto dy = hn::LoadU(df, w + at.dy + k);
      const auto v = hn::LoadU(df, w + at.dx + k);
      hn::StoreU(hn::MulAdd(x, v, hn::LoadU(df, w + at.dd + j)), df, w + at.dd + j);
      hn::StoreU(hn::MulAdd(v, hn::LoadU(df, w + at.d + j), hn::Mul(skip, dy)), df, w + at.dx + k);
      sum = hn::MulAdd(x, dy, sum);
    }
    if (dD != nullptr) dD[q] += hn::GetLane(hn::SumOfLanes(df, sum));
  }
}

// The steps. `exponent` holds the gradient by each d_t A that comes through pairs of the chunk's tokens. To
// it come the tokens i >= t that read the state before the chunk, the tokens j < t that live on in the state
// after it, and `through`: what that state has of the state before.
inline void finish_steps(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk,
                         std::int64_t head, double through, double& dA, double& ddt_bias,
                         float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const Problem& p = b.forward;
  const float rate = p.A.data<float>()[head];
  double read = 0.0;
  for (std::int64_t t = chunk.tokens - 1; t >= 0; --t) {
    read += static_cast<double>(w[at.off + t]);
    w[at.exponent + t] += static_cast<float>(read);
  }
  double live = through;
  for (std::int64_t t = 0; t < chunk.tokens; ++t) {
    w[at.exponent + t] += static_cast<float>(live);
    live += static_cast<double>(w[at.ends + t]);
    dA += static_cast<double>(w[at.d + t]) * static_cast<double>(w[at.exponent + t]);
    w[at.dd + t] += rate * w[at.exponent + t];
  }
  const auto low = hn::Set(df, p.dt_limit.low);
  const auto high = hn::Set(df, p.dt_limit.high);
  for (std::int64_t t = 0; t < chunk.tokens; t += g::kLanes) {
    auto value = hn::LoadU(df, w + at.raw + t);
    auto slope = hn::Set(df, 1.0F);
    if (p.dt_softplus) {
      slope = krait::HWY_NAMESPACE::sigmoid(df, value);
      value = krait::HWY_NAMESPACE::softplus(df, value);
    }
    const auto clamped = hn::Or(hn::Lt(value, low), hn::Gt(value, high));
    const auto dd = hn::LoadU(df, w + at.dd + t);
    hn::StoreU(hn::IfThenZeroElse(clamped, hn::Mul(dd, slope)), df, w + at.dd + t);
  }
  for (std::int64_t t = 0; t < chunk.tokens; ++t) ddt_bias += static_cast<double>(w[at.dd + t]);
  if (!b.ddt) return;
  for_each_stretch(
      p, chunk, [&](std::int64_t first, std::int64_t position, std::int64_t step, std::int64_t count) {
        krait::HWY_NAMESPACE::store_tile(
            w + at.dd + first, 1, b.ddt.dtype(), b.ddt.raw(),
            chunk.run->row * b.ddt.stride(0) + position * b.ddt.stride(1) + head * b.ddt.stride(2),
            step * b.ddt.stride(1), 1, count, 1);
      });
}

// y = exp(a_i) S C_i.
inline void read_state(const Problem& p, const BackwardLayout& at, std::int64_t tokens,
                       const float* HWY_RESTRICT S, float* HWY_RESTRICT w) {
  multiply(by_rows(S, at.state_stride), w + at.Ct, at.token_stride, p.d_state(), w + at.y, at.token_stride,
           p.headdim(), tokens, false);
  scale_tokens(p, at, tokens, w + at.y, w + at.from_start, w + at.y);
}

// dz = (y + D x) times what load_output_gradient has left in `gate`.
inline void store_gate_gradient(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk,
                                std::int64_t head, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const Problem& p = b.forward;
  for (std::int64_t q = 0; q < p.headdim(); ++q) {
    const auto skip = hn::Set(df, p.D ? p.D.data<float>()[head * p.headdim() + q] : 0.0F);
    const std::int64_t row = q * at.token_stride;
    for (std::int64_t k = row; k < row + chunk.tokens; k += g::kLanes) {
      const auto y = hn::MulAdd(skip, hn::LoadU(df, w + at.x + k), hn::LoadU(df, w + at.y + k));
      hn::StoreU(hn::Mul(y, hn::LoadU(df, w + at.gate + k)), df, w + at.y + k);
    }
  }
  store_channels(p, chunk, w + at.y, at.token_stride, b.dz, head);
}

}  // namespace krait::ssd_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SSD_CPU_BACKWARD_CHUNK_INL_H_
