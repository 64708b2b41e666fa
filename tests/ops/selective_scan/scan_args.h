// Random arguments of selective_scan with any options, for the tests of its forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "core/on_device.h"
#include "krait/core/error.h"
#include "krait/ops/selective_scan.h"
#include "ops/random_tensors.h"

namespace krait::testing {

// The path that is not the reference: that of the CPU, or the GPU's.
inline ScanPath fast_path() { return testing::on_gpu() ? ScanPath::automatic : ScanPath::simd; }

struct Options {
  std::int64_t batch = 2;
  std::int64_t channels = 5;
  std::int64_t length = 7;
  std::int64_t d_state = 4;
  std::int64_t groups = 1;
  DType dtype = DType::f32;
  bool complex = false;
  bool constant_b = false;
  bool constant_c = false;
  bool skip = false;
  bool gate = false;
  bool bias = false;
  bool softplus = false;
  bool reverse = false;
  bool initial = false;
  bool positions = false;
  int sequences = 0;  // 0: none, 1: seq_idx, 2: seq_idx with padding, 3: cu_seqlens
  bool scatter = false;
  bool channel_last = false;

  [[nodiscard]] int layout() const { return scatter ? kScattered : 0; }
};

inline std::string describe(const Options& o) {
  return concat("B ", o.batch, " D ", o.channels, " L ", o.length, " N ", o.d_state, " G ", o.groups, " ",
                name_of(o.dtype), o.complex ? " complex" : "", o.constant_b ? " constant B" : "",
                o.constant_c ? " constant C" : "", o.skip ? " D" : "", o.gate ? " z" : "",
                o.bias ? " bias" : "", o.softplus ? " softplus" : "", o.reverse ? " reverse" : "",
                o.initial ? " initial" : "", o.positions ? " positions" : "", " sequences ", o.sequences,
                o.scatter ? " scattered" : "", o.channel_last ? " channel-last" : "");
}

inline SelectiveScanArgs make_args(const Options& o, std::uint64_t seed) {
  Rng rng(seed);
  SelectiveScanArgs args;
  const std::int64_t batch = o.sequences == 3 ? 1 : o.batch;
  const Dims sequence = {batch, o.channels, o.length};
  const auto like_u = [&](double low, double high) {
    if (!o.channel_last) return random_tensor(rng, sequence, o.dtype, low, high, o.layout());
    return random_tensor(rng, {batch, o.length, o.channels}, o.dtype, low, high).transpose(1, 2);
  };
  const DType state_dtype = o.complex ? DType::c64 : DType::f32;
  args.u = like_u(-2, 2);
  // Without softplus a step may be negative.
  args.delta = o.softplus ? like_u(-4, 3) : like_u(-0.05, 0.8);
  args.A = random_tensor(rng, {o.channels, o.d_state}, state_dtype, -3, -0.01, o.layout());
  const auto factor = [&](bool constant) {
    if (constant)
      return random_tensor(rng, {o.channels, o.d_state}, o.complex ? DType::c64 : o.dtype, -1, 1, o.layout());
    const Dims shape = {batch, o.groups, o.d_state, (o.complex ? 2 : 1) * o.length};
    if (o.channel_last)
      return random_tensor(rng, {batch, shape[3], o.groups, o.d_state}, o.dtype, -1, 1).permute({0, 2, 3, 1});
    return random_tensor(rng, shape, o.dtype, -1, 1, o.layout());
  };
  args.B = factor(o.constant_b);
  args.C = factor(o.constant_c);
  if (o.skip) args.D = random_tensor(rng, {o.channels}, DType::f32, -1, 1, o.layout());
  if (o.gate) args.z = like_u(-4, 4);
  if (o.bias) args.delta_bias = random_tensor(rng, {o.channels}, DType::f32, -0.05, 0.5, o.layout());
  args.delta_softplus = o.softplus;
  args.reverse = o.reverse;
  args.return_last_state = true;
  std::int64_t states = batch;
  if (o.sequences == 1 || o.sequences == 2) {
    std::vector<std::int32_t> ids;
    for (std::int64_t b = 0; b < batch; ++b) {
      int id = static_cast<int>(rng.next_u32() % 3);
      for (std::int64_t t = 0; t < o.length; ++t) {
        if (rng.next_u32() % 4 == 0) id = static_cast<int>(rng.next_u32() % 5);
        const bool padding = o.sequences == 2 && rng.next_u32() % 3 == 0;
        ids.push_back(padding ? -1 : id);
      }
    }
    args.seq_idx = Tensor::from(ids, {batch, o.length});
  } else if (o.sequences == 3) {
    std::vector<std::int64_t> bounds = {0};
    while (bounds.back() < o.length)
      bounds.push_back(std::min<std::int64_t>(o.length, bounds.back() + rng.next_u32() % 7));
    bounds.push_back(o.length);
    args.cu_seqlens = Tensor::from(bounds);
    states = std::ssize(bounds) - 1;
  }
  if (o.initial)
    args.initial_state = random_tensor(rng, {states, o.channels, o.d_state}, state_dtype, -2, 2, o.layout());
  if (o.positions && o.length > 0) {
    std::vector<std::int64_t> positions;
    for (std::int64_t i = 0; i < 3 * batch; ++i) positions.push_back(rng.next_u32() % o.length);
    args.state_positions = Tensor::from(positions, {batch, 3});
  }
  return args;
}

inline Tensor in_double(const Tensor& t) {
  if (!t) return t;
  if (t.dtype() == DType::c64) return t.to(DType::c128);
  return is_float(t.dtype()) ? t.to(DType::f64) : t;
}

inline SelectiveScanArgs in_double(SelectiveScanArgs args) {
  for (Tensor* t : {&args.u, &args.delta, &args.A, &args.B, &args.C, &args.D, &args.z, &args.delta_bias,
                    &args.initial_state})
    *t = in_double(*t);
  return args;
}

inline double output_precision(DType dtype) {
  return dtype == DType::bf16 ? 0x1p-8 : dtype == DType::f16 ? 0x1p-11 : 1e-6;
}

inline constexpr double kPrecision = 4e-6;

// Sizes around those of vectors, tiles and blocks.
inline std::vector<Options> each_size() {
  std::vector<Options> all;
  for (const std::int64_t channels : {1, 7, 8, 9, 31, 32, 33, 100, 300})
    all.push_back({.channels = channels, .length = 20, .skip = true, .gate = true, .softplus = true});
  for (const std::int64_t length : {1, 2, 63, 64, 65, 200})
    all.push_back({.channels = 9, .length = length, .softplus = true, .initial = true});
  for (const std::int64_t d_state : {1, 2, 3, 4, 5, 8, 16, 31, 64, 130})
    all.push_back({.channels = 9, .length = 40, .d_state = d_state, .softplus = true, .initial = true});
  return all;
}

// Sizes at which a GPU shares out its work in other ways (choose_forward, choose_backward): from four
// channels of a team of lanes down to 16 lanes of a channel, and rows in pieces. Whole and aligned tiles have
// a path of their own.
inline std::vector<Options> sizes_of_a_gpu() {
  const Options pieces = {.batch = 1, .channels = 20, .length = 1100, .d_state = 5};
  std::vector<Options> all = {
      {.batch = 60, .channels = 110, .length = 41, .d_state = 11, .channel_last = true},
      pieces,
      pieces,
      pieces,
      pieces};
  all[1].d_state = 40;
  all[2].channel_last = all[2].reverse = true;
  all[3].sequences = 2;
  all[4].sequences = 3;
  const DType dtypes[] = {DType::bf16, DType::f32, DType::f16};
  for (const std::int64_t batch : {250, 130, 66, 33, 8}) {
    Options o = {.batch = batch, .channels = 128, .length = batch > 200 ? 40 : 104, .d_state = 16};
    o.dtype = dtypes[all.size() % 3];
    o.reverse = batch == 33;
    all.push_back(o);
    o.dtype = dtypes[all.size() % 3];
    o.channel_last = true;
    all.push_back(o);
  }
  // Rows whose backward is cut into pieces.
  all.push_back({.batch = 50, .channels = 40, .length = 512, .d_state = 5});
  all.push_back({.batch = 50, .channels = 64, .length = 512, .d_state = 16, .channel_last = true});
  all.back().dtype = DType::bf16;
  all.push_back(all.back());
  all.back().reverse = true;
  // And walked in turn: the last one of a row is shorter, or not.
  all.push_back({.batch = 300, .channels = 40, .length = 300, .d_state = 3});
  all.push_back({.batch = 140, .channels = 128, .length = 256, .d_state = 4, .channel_last = true});
  all.back().dtype = DType::bf16;
  all.back().reverse = true;
  for (Options& o : all) {
    o.skip = o.gate = o.bias = o.softplus = o.initial = true;
    o.positions = o.batch < 200 && o.length != 512;
  }
  // Tensors whose channels lie side by side have a kernel of their own, where no states are wanted: from four
  // channels of a team down to one, whole and broken tiles, whole and broken blocks of channels.
  for (const std::int64_t batch : {250, 130, 33, 2}) {
    for (const std::int64_t length : {1, 31, 104}) {
      Options o = {.batch = batch, .channels = 128, .length = length, .d_state = 16};
      o.dtype = dtypes[all.size() % 3];
      o.reverse = length == 31;
      o.bias = o.initial = length != 31;
      o.skip = length != 1;
      o.gate = o.softplus = o.channel_last = true;
      all.push_back(o);
      o.groups = 2;
      o.channels = 2 * 36;
      o.d_state = 5;
      o.dtype = dtypes[all.size() % 3];
      o.sequences = batch == 2 ? 3 : batch == 33 ? 1 : 0;
      all.push_back(o);
    }
  }
  all.push_back(all[2]);  // in pieces
  all.back().positions = false;
  // So does the backward, for as many blocks of 128 channels: broken blocks and groups, sequences, rows in
  // pieces that are walked at the same time or in turn, the last one shorter.
  Options o = {
      .batch = 20, .channels = 2 * 100, .length = 75, .d_state = 5, .groups = 2, .dtype = DType::bf16};
  o.skip = o.gate = o.bias = o.softplus = o.initial = o.channel_last = true;
  o.sequences = 1;
  all.push_back(o);
  o.sequences = 3;
  o.length = 700;
  o.reverse = true;
  all.push_back(o);
  o = {.batch = 25, .channels = 128, .length = 512, .d_state = 16, .dtype = DType::f16};
  o.skip = o.gate = o.bias = o.softplus = o.initial = o.channel_last = true;
  all.push_back(o);
  o.reverse = true;
  o.batch = 140;
  o.length = 300;
  o.d_state = 3;
  all.push_back(o);
  return all;
}

// `plain` with each option that forward and backward have, and with a few that touch one another.
inline std::vector<Options> each_option(const Options& plain) {
  std::vector<Options> all(19, plain);
  all[0].groups = plain.channels;
  all[1].dtype = DType::bf16;
  all[2].dtype = DType::f16;
  all[3].complex = true;
  all[4].constant_b = true;
  all[5].constant_c = true;
  all[6].skip = true;
  all[7].gate = true;
  all[8].bias = true;
  all[9].softplus = true;
  all[10].reverse = true;
  all[11].initial = true;
  all[12].sequences = 1;
  all[13].sequences = 2;
  all[14].sequences = 3;
  all[15].scatter = true;
  all[16].channel_last = true;
  all[17].complex = all[17].constant_b = all[17].constant_c = true;
  all[18].sequences = 3;
  all[18].reverse = all[18].initial = true;
  return all;
}

inline Options random_options(std::uint64_t seed) {
  Rng rng(seed, 1);
  const auto pick = [&](auto... values) {
    const std::int64_t all[] = {values...};
    return all[rng.next_u32() % sizeof...(values)];
  };
  const auto coin = [&] { return rng.next_u32() % 2 == 0; };
  Options o;
  o.batch = pick(1, 2, 3);
  o.groups = pick(1, 1, 2, 3);
  o.channels = o.groups * pick(1, 2, 7, 8, 16, 33, 70);
  o.length = pick(0, 1, 2, 5, 31, 64, 65, 100, 150);
  o.d_state = pick(0, 1, 2, 3, 4, 7, 8, 16, 17);
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  o.dtype = dtypes[rng.next_u32() % 3];
  o.complex = rng.next_u32() % 4 == 0;
  o.constant_b = rng.next_u32() % 4 == 0;
  o.constant_c = rng.next_u32() % 4 == 0;
  o.skip = coin();
  o.gate = coin();
  o.bias = coin();
  o.softplus = coin();
  o.reverse = rng.next_u32() % 3 == 0;
  o.initial = coin();
  o.positions = coin();
  o.sequences = static_cast<int>(pick(0, 0, 0, 1, 2, 3));
  o.scatter = coin();
  o.channel_last = coin();
  return o;
}

}  // namespace krait::testing
