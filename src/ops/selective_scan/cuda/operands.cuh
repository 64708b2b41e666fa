// The tensors of a problem as kernels see them, states real or complex.
#pragma once

#include <cstdint>

#include "core/cuda/elements.cuh"
#include "ops/selective_scan/cuda/pieces.h"

namespace krait::scan {

using cuda::AnyView;

struct Complex {
  float re = 0.0F;
  float im = 0.0F;
};

__device__ __forceinline__ Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ __forceinline__ Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ __forceinline__ Complex operator*(float a, Complex b) { return {a * b.re, a * b.im}; }
__device__ __forceinline__ Complex conjugate(Complex a) { return {a.re, -a.im}; }
__device__ __forceinline__ float conjugate(float a) { return a; }
__device__ __forceinline__ float real_part(Complex a) { return a.re; }
__device__ __forceinline__ float real_part(float a) { return a; }
__device__ __forceinline__ float exponential(float a) { return expf(a); }
__device__ __forceinline__ Complex exponential(Complex a) {
  const float length = expf(a.re);
  float sine = 0.0F;
  float cosine = 0.0F;
  sincosf(a.im, &sine, &cosine);
  // An underflowed decay is 0 whatever the angle.
  return length == 0.0F ? Complex{} : Complex{length * cosine, length * sine};
}

template <typename State>
inline constexpr int kNumbers = sizeof(State) / sizeof(float);

// Floats of any dtype, or c64 where State is complex.
template <typename State, int kRank>
struct StateView : AnyView<kRank> {
  StateView() = default;
  explicit StateView(const Tensor& t) : AnyView<kRank>(t) {}

  template <typename... Index>
  __device__ __forceinline__ State get(Index... index) const {
    if constexpr (kNumbers<State> == 1)
      return this->load(index...);
    else
      return static_cast<const State*>(this->data)[this->offset(index...)];
  }
  template <typename... Index>
  __device__ __forceinline__ void set(State value, Index... index) const {
    if constexpr (kNumbers<State> == 1)
      this->store(value, index...);
    else
      static_cast<State*>(this->data)[this->offset(index...)] = value;
  }
};

// B or C.
template <typename State>
struct Factor {
  explicit Factor(const Tensor& t)
      : constant(t.ndim() == 2 ? t : Tensor()), variable(t.ndim() == 4 ? t : Tensor()) {}

  StateView<State, 2> constant;
  AnyView<4> variable;

  __device__ __forceinline__ State get(std::int64_t row, std::int64_t group, std::int64_t channel,
                                       std::int64_t n, std::int64_t t) const {
    if (constant) return constant.get(channel, n);
    if constexpr (kNumbers<State> == 1)
      return variable.load(row, group, n, t);
    else
      return {variable.load(row, group, n, 2 * t), variable.load(row, group, n, 2 * t + 1)};
  }
};

template <typename State>
struct Inputs {
  explicit Inputs(const Problem& p)
      : u(p.u),
        delta(p.delta),
        A(p.A),
        B(p.B),
        C(p.C),
        D(p.D),
        z(p.z),
        delta_bias(p.delta_bias),
        initial_state(p.initial_state),
        rows(p.u.size(0)),
        channels(p.channels),
        d_state(p.d_state),
        groups(p.groups),
        softplus(p.delta_softplus) {}

  AnyView<3> u;
  AnyView<3> delta;
  StateView<State, 2> A;
  Factor<State> B;
  Factor<State> C;
  AnyView<1> D;
  AnyView<3> z;
  AnyView<1> delta_bias;
  StateView<State, 3> initial_state;
  std::int64_t rows;  // of the batch
  std::int64_t channels;
  std::int64_t d_state;
  std::int64_t groups;
  bool softplus;

  __device__ __forceinline__ std::int64_t group_of(std::int64_t channel) const {
    return channel / (channels / groups);
  }
  __device__ __forceinline__ float raw_step(std::int64_t row, std::int64_t channel, std::int64_t t) const {
    const float bias = delta_bias ? delta_bias.load(channel) : 0.0F;
    return delta.load(row, channel, t) + bias;
  }
  __device__ __forceinline__ State state_before(const Piece& piece, std::int64_t channel,
                                                std::int64_t n) const {
    return piece.first && initial_state ? initial_state.get(piece.sequence, channel, n) : State{};
  }
};

// What y counts a state with: a complex one stands for itself and its conjugate.
template <typename State>
inline constexpr float kCounted = kNumbers<State> == 1 ? 1.0F : 2.0F;

}  // namespace krait::scan
