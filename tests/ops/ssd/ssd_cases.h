// Random arguments of ssd, and the fast paths against the reference in f64.
#pragma once

#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/context.h"
#include "krait/ops/ssd.h"
#include "ops/random_tensors.h"

namespace krait::testing {

inline SsdArgs in_f64(SsdArgs args) {
  for (Tensor* t :
       {&args.x, &args.dt, &args.A, &args.B, &args.C, &args.D, &args.z, &args.dt_bias, &args.initial_states})
    *t = to_f64(*t);
  args.out = {};
  args.final_states = {};
  args.path = SsdPath::reference;
  return args;
}

// The paths of the CPU are asked for by name; a GPU has its own.
inline SsdPath chunked_path() { return on_gpu() ? SsdPath::automatic : SsdPath::chunked; }
inline std::vector<SsdPath> fast_paths() {
  if (on_gpu()) return {SsdPath::automatic};
  return {SsdPath::recurrent, SsdPath::chunked};
}
inline std::vector<SsdPath> all_paths() {
  std::vector<SsdPath> paths = fast_paths();
  paths.insert(paths.begin(), SsdPath::reference);
  return paths;
}

// `operands`: what a GPU may lose, relative to the largest output or state, where tensor cores take 16-bit
// operands: the state and the masked matrix are rounded for them.
inline void expect_fast(const SsdArgs& args, double operands = 0.0) {
  Context ctx({.threads = 2});
  const SsdResult exact = ssd(ctx, in_f64(args));
  EXPECT_EQ(ctx.backend(), "ssd: reference");
  for (const SsdPath path : fast_paths()) {
    const char* name = on_gpu() ? "on a GPU" : path == SsdPath::recurrent ? "recurrent" : "chunked";
    SCOPED_TRACE(concat(name, " chunk ", args.chunk_size));
    SsdArgs fast = args;
    fast.path = path;
    if (args.out) fast.out.fill(7.0);
    const SsdResult found = run(ctx, ssd, fast);
    if (!on_gpu()) {
      EXPECT_EQ(ctx.backend(), concat("ssd: ", name, " (", simd_target(), ")"));
    }
    EXPECT_EQ(found.out.dtype(), args.x.dtype());
    // Sums over N and the chunk, in f32, on top of what the output's type rounds.
    constexpr double kSums = 1e-5;
    const auto near = [&](const Tensor& value, const Tensor& expected, double rounding, const char* of) {
      if (on_gpu() && operands > 0.0)
        expect_close(value, expected, rounding, operands, of);
      else
        expect_close(value, expected, rounding + kSums, of);
    };
    near(found.out, exact.out, rounding_of(args.x.dtype()), "out");
    if (args.return_final_states) {
      EXPECT_EQ(found.final_states.dtype(), DType::f32);
      near(found.final_states, exact.final_states, 0.0, "final_states");
    }
    if (args.state_positions) near(found.states, exact.states, 0.0, "states");
  }
}

struct SsdSizes {
  std::int64_t rows = 1;
  std::int64_t length = 1;
  std::int64_t heads = 1;
  std::int64_t headdim = 1;
  std::int64_t groups = 1;
  std::int64_t d_state = 1;
};

// The required arguments, dt as the models have it: small and positive.
inline SsdArgs plain_case(Rng& rng, const SsdSizes& s, DType dtype = DType::f32, int layout = 0) {
  return {.x = random_tensor(rng, {s.rows, s.length, s.heads, s.headdim}, dtype, -1, 1, layout),
          .dt = random_tensor(rng, {s.rows, s.length, s.heads}, dtype, 0.01, 0.5, layout),
          .A = random_tensor(rng, {s.heads}, DType::f32, -4, -0.1, layout),
          .B = random_tensor(rng, {s.rows, s.length, s.groups, s.d_state}, dtype, -1, 1, layout),
          .C = random_tensor(rng, {s.rows, s.length, s.groups, s.d_state}, dtype, -1, 1, layout)};
}

// Calls check(name, set) for each option that forward and backward have; set(args) sets it in a plain case of
// these sizes.
inline constexpr SsdSizes kOptionSizes{
    .rows = 2, .length = 70, .heads = 6, .headdim = 20, .groups = 2, .d_state = 24};
template <typename Check>
void check_each_option(Rng& rng, const Check& check) {
  check("D by head", [&](SsdArgs& a) { a.D = random_tensor(rng, {6}); });
  check("D by channel", [&](SsdArgs& a) { a.D = random_tensor(rng, {6, 20}); });
  check("z", [&](SsdArgs& a) { a.z = random_tensor(rng, a.x.shape()); });
  check("dt_bias", [&](SsdArgs& a) { a.dt_bias = random_tensor(rng, {6}); });
  check("dt_softplus", [&](SsdArgs& a) { a.dt_softplus = true; });
  check("dt_limit", [&](SsdArgs& a) { a.dt_limit = {0.1F, 0.2F}; });
  check("initial_states", [&](SsdArgs& a) { a.initial_states = random_tensor(rng, {2, 6, 20, 24}); });
  check("reverse", [&](SsdArgs& a) { a.reverse = true; });
  check("seq_idx", [&](SsdArgs& a) {
    a.seq_idx = Tensor::zeros({2, 70}, DType::i32);
    for (std::int32_t t = 0; t < 140; ++t) a.seq_idx.data<std::int32_t>()[t] = t % 70 / 23;
  });
  check("one group for all heads", [&](SsdArgs& a) {
    a.B = a.B.slice(2, 0, 1);
    a.C = a.C.slice(2, 1, 2);
  });
}

inline SsdArgs random_case(Rng& rng, std::string& name) {
  const DType dtype = random_dtype(rng);
  const bool packed = coin(rng, 0.3);
  SsdSizes s;
  s.rows = packed ? 1 : pick(rng, 0, 3);
  s.length = coin(rng, 0.2) ? pick(rng, 60, 200) : pick(rng, 0, 40);
  s.groups = pick(rng, 1, 3);
  s.heads = s.groups * pick(rng, 0, 3);
  s.headdim = pick(rng, 0, 40);
  s.d_state = pick(rng, 0, 40);
  const auto layout = [&] { return static_cast<int>(pick(rng, 0, 3)); };
  SsdArgs args = plain_case(rng, s, dtype, layout());
  if (coin(rng)) args.D = random_tensor(rng, {s.heads}, DType::f32, -1, 1, layout());
  if (coin(rng, 0.3)) args.D = random_tensor(rng, {s.heads, s.headdim}, dtype, -1, 1, layout());
  if (coin(rng)) args.z = random_tensor(rng, args.x.shape(), dtype, -2, 2, layout());
  if (coin(rng)) {
    args.dt_softplus = true;
    args.dt = random_tensor(rng, args.dt.shape(), DType::f32, -6, 1, layout());
    args.dt_bias = random_tensor(rng, {s.heads}, DType::f32, -1, 1, layout());
  }
  if (coin(rng, 0.3)) args.dt_limit = {0.05F, 0.3F};
  args.reverse = coin(rng, 0.3);
  args.chunk_size =
      std::vector<std::int64_t>{0, 1, 7, 16, 64, 256}[static_cast<std::size_t>(pick(rng, 0, 5))];
  std::int64_t sequences = s.rows;
  if (packed) {
    const std::vector<std::int64_t> offsets = random_offsets(rng, s.length);
    args.cu_seqlens = Tensor::from(offsets);
    sequences = static_cast<std::int64_t>(offsets.size()) - 1;
    if (coin(rng)) args.cu_seqlens = args.cu_seqlens.to(DType::i32);
  }
  if (coin(rng, 0.3)) {
    args.seq_idx = random_ids(rng, s.rows, s.length);
    if (coin(rng)) args.seq_idx = args.seq_idx.to(DType::i32);
  }
  if (coin(rng))
    args.initial_states = random_tensor(rng, {sequences, s.heads, s.headdim, s.d_state},
                                        coin(rng) ? dtype : DType::f32, -1, 1, layout());
  if (coin(rng, 0.4) && s.length > 0) {
    const std::int64_t wanted = pick(rng, 0, 4);
    args.state_positions = Tensor::zeros({s.rows, wanted}, DType::i64);
    for (std::int64_t i = 0; i < s.rows * wanted; ++i)
      args.state_positions.data<std::int64_t>()[i] = pick(rng, 0, s.length - 1);
  }
  args.return_final_states = coin(rng);
  if (coin(rng, 0.3)) args.out = laid_out(Tensor::zeros(args.x.shape(), dtype), layout());
  if (coin(rng, 0.3)) {
    args.final_states = laid_out(Tensor::zeros({sequences, s.heads, s.headdim, s.d_state}),
                                 static_cast<int>(pick(rng, 0, 2)));
    args.return_final_states = true;
  }
  name = concat("x ", args.x.shape(), " ", dtype, " G ", s.groups, " N ", s.d_state, " sequences ", sequences,
                args.D ? " D" : "", args.z ? " z" : "", args.dt_softplus ? " softplus" : "",
                args.reverse ? " reverse" : "", args.seq_idx ? " seq_idx" : "",
                args.cu_seqlens ? " packed" : "", args.initial_states ? " initial" : "",
                args.state_positions ? " positions" : "", args.final_states ? " final" : "");
  return args;
}

// Case `i` of shapes that run on tensor cores on a GPU: rows of x, B and C are pieces of one wide row of a
// token.
inline SsdArgs tensor_core_case(Rng& rng, int i, std::string& name) {
  const auto choose = [&](const std::vector<std::int64_t>& from) {
    return from[static_cast<std::size_t>(pick(rng, 0, static_cast<std::int64_t>(from.size()) - 1))];
  };
  const DType dtype = i % 2 == 0 ? DType::bf16 : DType::f16;
  const std::int64_t headdim = choose({64, 64, 128});
  const std::int64_t d_state = choose({16, 48, 64, 112, 128});
  const std::int64_t length = choose({16, 63, 64, 65, 130, 200, 600});
  const std::int64_t groups = choose({1, 2});
  const std::int64_t heads = groups * choose({1, 2, 3});
  const bool packed = i % 5 == 0;
  const std::int64_t rows = packed ? 1 : 2;
  const std::int64_t width = heads * headdim + 2 * groups * d_state;
  const Tensor xBC = random_tensor(rng, {rows, length, width}, dtype);
  const auto part = [&](std::int64_t count, std::int64_t size, std::int64_t offset) {
    return xBC.as_strided({rows, length, count, size}, {length * width, width, size, 1}, offset);
  };
  SsdArgs args{.x = part(heads, headdim, 0),
               .dt = random_tensor(rng, {rows, length, heads}, dtype, 0.01, i % 4 == 0 ? 2.0 : 0.1),
               .A = random_tensor(rng, {heads}, DType::f32, i % 7 == 0 ? -100.0 : -4.0, -0.01),
               .B = part(groups, d_state, heads * headdim),
               .C = part(groups, d_state, heads * headdim + groups * d_state)};
  if (coin(rng)) args.D = random_tensor(rng, {heads});
  if (coin(rng, 0.2)) args.D = random_tensor(rng, {heads, headdim});
  if (coin(rng, 0.2)) args.z = random_tensor(rng, args.x.shape(), dtype);
  if (coin(rng, 0.4)) {
    args.dt_softplus = true;
    args.dt = random_tensor(rng, args.dt.shape(), DType::f32, -6, 1);
    args.dt_bias = random_tensor(rng, {heads}, DType::f32, -1, 1);
  }
  if (coin(rng, 0.2)) args.dt_limit = {0.02F, 0.08F};
  args.reverse = coin(rng, 0.2);
  std::int64_t sequences = rows;
  if (packed) {
    args.cu_seqlens = Tensor::from<std::int64_t>({0, 0, length / 3, length});
    sequences = 3;
  }
  if (coin(rng, 0.2)) args.seq_idx = random_ids(rng, rows, length);
  if (coin(rng)) args.initial_states = random_tensor(rng, {sequences, heads, headdim, d_state});
  args.return_final_states = coin(rng);
  name = concat("x ", args.x.shape(), " ", dtype, " G ", groups, " N ", d_state, args.D ? " D" : "",
                args.z ? " z" : "", args.dt_softplus ? " softplus" : "", args.reverse ? " reverse" : "",
                args.seq_idx ? " seq_idx" : "", args.cu_seqlens ? " packed" : "",
                args.initial_states ? " initial" : "");
  return args;
}

}  // namespace krait::testing
