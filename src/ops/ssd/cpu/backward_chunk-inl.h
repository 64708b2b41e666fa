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

// Row q of `to` = t[row, tokens of the chunk, head, q], and 0 up to a whole vector.
inline void load_channels(const Problem& p, const Chunk& chunk, const Tensor& t, std::int64_t head, float* to,
                          std::int64_t to_stride) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(hn::ScalableTag<float>()));
  for_each_stretch(
      p, chunk, [&](std::int64_t first, std::int64_t position, std::int64_t step, std::int64_t count) {
        krait::HWY_NAMESPACE::load_tile(
            t.dtype(), t.raw(), chunk.run->row * t.stride(0) + position * t.stride(1) + head * t.stride(2),
            t.stride(3), step * t.stride(1), t.size(3), count, to + first, to_stride);
      });
  const std::int64_t rest = (lanes - chunk.tokens % lanes) % lanes;
  for (std::int64_t q = 0; q < t.size(3); ++q) std::fill_n(to + q * to_stride + chunk.tokens, rest, 0.0F);
}

inline void store_channels(const Problem& p, const Chunk& chunk, const float* from, std::int64_t from_stride,
                           const Tensor& t, std::int64_t head) {
  for_each_stretch(p, chunk,
                   [&](std::int64_t first, std::int64_t position, std::int64_t step, std::int64_t count) {
                     krait::HWY_NAMESPACE::store_tile(
                         from + first, from_stride, t.dtype(), t.raw(),
                         chunk.run->row * t.stride(0) + position * t.stride(1) + head * t.stride(2),
                         t.stride(3), step * t.stride(1), t.size(3), count);
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

// C B^T of the chunk (lower triangle, by tiles), and the transposes that the heads need.
inline void load_group(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk,
                       std::int64_t group, float* HWY_RESTRICT w) {
  const Problem& p = b.forward;
  const std::int64_t d_state = p.d_state();
  load_tokens(p, chunk, p.B, group, w + at.B, at.state_stride);
  load_tokens(p, chunk, p.C, group, w + at.C, at.state_stride);
  krait::HWY_NAMESPACE::load_tile(w + at.B, 1, at.state_stride, d_state, chunk.tokens, w + at.Bt,
                                  at.token_stride);
  if (b.dz)
    krait::HWY_NAMESPACE::load_tile(w + at.C, 1, at.state_stride, d_state, chunk.tokens, w + at.Ct,
                                    at.token_stride);
  for (std::int64_t i = 0; i < chunk.tokens; i += g::kTileRows)
    multiply(by_rows(w + at.C + i * at.state_stride, at.state_stride), w + at.Bt, at.token_stride, d_state,
             w + at.CB + i * at.token_stride, at.token_stride, g::kTileRows,
             std::min(i + g::kTileRows, chunk.tokens), false);
}

// x^T, the factors of the steps, and `left` = exp(a_last - a_j) d_j x_j. Returns exp(a_last).
inline float load_inputs(const Problem& p, const BackwardLayout& at, const Chunk& chunk, std::int64_t head,
                         float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  load_channels(p, chunk, p.x, head, w + at.x, at.token_stride);
  load_raw_steps(p, chunk, head, w + at.raw);
  discretize_steps(p, chunk.tokens, head, w + at.raw, w + at.d, w + at.exponent);
  sum_exponents(chunk.tokens, w + at.exponent, w + at.high, w + at.low);
  const float decay = decays_to_end(chunk.tokens, w + at.high, w + at.low, w + at.to_end);
  for_each_vector(p.headdim(), chunk.tokens, at.token_stride, [&](std::int64_t j, std::int64_t k) HWY_ATTR {
    const auto factor = hn::Mul(hn::LoadU(df, w + at.d + j), hn::LoadU(df, w + at.to_end + j));
    hn::StoreU(hn::Mul(factor, hn::LoadU(df, w + at.x + k)), df, w + at.left + k);
  });
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

// The pairs j <= i of the chunk. With E_ij = exp(a_i - a_j) and dM_ij = dy_i . x_j:
//   M = CB E;  G += dM E d_j, the gradient by CB;  W = dM E d_j CB, the gradient by the exponent a_i - a_j.
// The exponent of token t takes part in the pairs i >= t > j. Rows are walked from the last one, so that
// what the columns have added up is what those pairs need: no difference of large sums is taken.
inline void weigh_pairs(const BackwardLayout& at, std::int64_t tokens, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  std::fill_n(w + at.column_sums, at.token_stride, 0.0F);
  for (std::int64_t i = tokens - 1; i >= 0; --i) {
    const std::int64_t row = i * at.token_stride;
    const auto high = hn::Set(df, w[at.high + i]);
    const auto low = hn::Set(df, w[at.low + i]);
    auto sum = hn::Zero(df);
    const auto pairs = [&](std::int64_t j, auto upto, auto below) HWY_ATTR {
      const auto e = upto(decay_between(high, low, w + at.high + j, w + at.low + j));
      const auto cb = upto(hn::LoadU(df, w + at.CB + row + j));
      const auto dm = upto(hn::LoadU(df, w + at.dM + row + j));
      hn::StoreU(hn::Mul(cb, e), df, w + at.M + row + j);
      const auto t = hn::Mul(hn::Mul(dm, e), hn::LoadU(df, w + at.d + j));
      hn::StoreU(hn::Add(hn::LoadU(df, w + at.G + row + j), t), df, w + at.G + row + j);
      const auto column = below(hn::MulAdd(t, cb, hn::LoadU(df, w + at.column_sums + j)));
      hn::StoreU(column, df, w + at.column_sums + j);
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
    w[at.exponent + i] = hn::GetLane(hn::SumOfLanes(df, sum));
  }
}

// dx (the gradient by d x) = dS B_j exp(a_last - a_j) + sum_i M_ij dy_i, and `ends`: the gradient by the
// exponent a_last - a_j of the first term.
inline void input_gradient(const Problem& p, const BackwardLayout& at, std::int64_t tokens,
                           const float* HWY_RESTRICT dS, bool flows, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const std::int64_t headdim = p.headdim();
  const std::int64_t stride = at.token_stride;
  if (flows) {
    multiply(by_rows(dS, at.state_stride), w + at.Bt, stride, p.d_state(), w + at.dx, stride, headdim, tokens,
             false);
    for (std::int64_t j = 0; j < tokens; j += g::kLanes) {
      const auto to_end = hn::LoadU(df, w + at.to_end + j);
      auto sum = hn::Zero(df);
      for (std::int64_t k = j; k < j + headdim * stride; k += stride) {
        const auto v = hn::Mul(to_end, hn::LoadU(df, w + at.dx + k));
        sum = hn::MulAdd(hn::LoadU(df, w + at.x + k), v, sum);
        hn::StoreU(v, df, w + at.dx + k);
      }
      hn::StoreU(hn::Mul(sum, hn::LoadU(df, w + at.d + j)), df, w + at.ends + j);
    }
  } else {
    std::fill_n(w + at.ends, stride, 0.0F);
  }
  // M is 0 above its diagonal, so that a panel of its columns starts at the diagonal.
  for (std::int64_t j = 0; j < tokens; j += g::kTileColumns)
    multiply(by_rows(w + at.dy + j, stride), w + at.M + j * stride + j, stride, tokens - j, w + at.dx + j,
             stride, headdim, g::kTileColumns, flows);
}

// dC += the part that comes through the state before the chunk, S: exp(a_i) S^T dy_i. `off`: the gradient by
// the exponent a_i of that part.
inline void state_gradient_of_C(const Problem& p, const BackwardLayout& at, std::int64_t tokens,
                                const float* HWY_RESTRICT S, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  multiply(transposed(w + at.dy_start, at.token_stride), S, at.state_stride, p.headdim(), w + at.dC_head,
           at.state_stride, tokens, p.d_state(), false);
  for (std::int64_t i = 0; i < tokens; ++i) {
    auto sum = hn::Zero(df);
    // Columns beyond N are 0 in C.
    for (std::int64_t k = i * at.state_stride; k < i * at.state_stride + p.d_state(); k += g::kLanes) {
      const auto v = hn::LoadU(df, w + at.dC_head + k);
      sum = hn::MulAdd(v, hn::LoadU(df, w + at.C + k), sum);
      hn::StoreU(hn::Add(hn::LoadU(df, w + at.dC + k), v), df, w + at.dC + k);
    }
    w[at.off + i] = hn::GetLane(hn::SumOfLanes(df, sum));
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

// dz = y times what load_output_gradient has left in `gate`; y is computed again. Uses dy_start.
inline void gate_gradient(const BackwardProblem& b, const BackwardLayout& at, const Chunk& chunk,
                          std::int64_t head, const float* HWY_RESTRICT S, float* HWY_RESTRICT w) {
  const hn::ScalableTag<float> df;
  const Problem& p = b.forward;
  const std::int64_t stride = at.token_stride;
  if (S != nullptr) {
    multiply(by_rows(S, at.state_stride), w + at.Ct, stride, p.d_state(), w + at.y, stride, p.headdim(),
             chunk.tokens, false);
    for_each_vector(p.headdim(), chunk.tokens, stride, [&](std::int64_t j, std::int64_t k) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::LoadU(df, w + at.y + k), hn::LoadU(df, w + at.from_start + j)), df,
                 w + at.y + k);
    });
  }
  float* inputs = w + at.dy_start;
  for_each_vector(p.headdim(), chunk.tokens, stride, [&](std::int64_t j, std::int64_t k) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::LoadU(df, w + at.x + k), hn::LoadU(df, w + at.d + j)), df, inputs + k);
  });
  krait::HWY_NAMESPACE::load_tile(w + at.M, 1, stride, chunk.tokens, chunk.tokens, w + at.Mt, stride);
  for (std::int64_t i = 0; i < chunk.tokens; i += g::kTileColumns)
    multiply(by_rows(inputs, stride), w + at.Mt + i, stride,
             std::min<std::int64_t>(i + g::kTileColumns, chunk.tokens), w + at.y + i, stride, p.headdim(),
             g::kTileColumns, S != nullptr);
  for (std::int64_t q = 0; q < p.headdim(); ++q) {
    const auto skip = hn::Set(df, p.D ? p.D.data<float>()[head * p.headdim() + q] : 0.0F);
    for (std::int64_t k = q * stride; k < q * stride + chunk.tokens; k += g::kLanes) {
      const auto y = hn::MulAdd(skip, hn::LoadU(df, w + at.x + k), hn::LoadU(df, w + at.y + k));
      hn::StoreU(hn::Mul(y, hn::LoadU(df, w + at.gate + k)), df, w + at.y + k);
    }
  }
  store_channels(p, chunk, w + at.y, stride, b.dz, head);
}

}  // namespace krait::ssd_detail::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // KRAIT_OPS_SSD_CPU_BACKWARD_CHUNK_INL_H_
