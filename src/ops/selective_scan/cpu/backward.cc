// The SIMD backward: lanes over channels, like the forward. A worker takes a block of channels and walks its
// tokens in tiles, twice: forward to keep the state before each tile, then from the last tile to the first,
// where the states of the tile are recomputed, a few at a time, and unwound while they are in the cache.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/selective_scan/cpu/backward.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/selective_scan/backward.h"
#include "ops/selective_scan/cpu/backward-inl.h"
#include "ops/selective_scan/cpu/lanes-inl.h"
#include "ops/selective_scan/scan.h"

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {
namespace {

class Worker {
 public:
  Worker(const BackwardPlan& plan, const BackwardScratch& scratch)
      : plan_(plan),
        p_(plan.problem),
        gradients_(plan.gradients),
        s_(scratch),
        half_(p_.d_state * s_.width),
        state_size_(plan.numbers() * half_) {
    std::fill_n(s_.dt, s_.fixed, 0.0F);
  }

  void run(const BackwardItem& item) {
    const std::int64_t in_group = p_.channels / p_.groups;
    for (std::int64_t block = item.first_block; block < item.last_block; ++block) {
      const std::int64_t first = block * plan_.division.block;
      group_ = item.group;
      first_channel_ = item.group * in_group + first;
      channels_ = std::min(plan_.division.block, in_group - first);
      // Lanes beyond the last channel compute on zeros, for the sums over lanes.
      if (channels_ % lanes() != 0) std::fill_n(s_.dt, s_.fixed, 0.0F);
      load_parameters();
      float* const memory = plan_.block_at(item.part, item.group, block);
      std::fill_n(memory, plan_.block_size(), 0.0F);
      sums_ = BlockSums(memory, p_.d_state, s_.width);
      first_of_segment_ = block == item.first_block;
      segment_ = item.segment;
      for (std::int64_t r = item.first_row; r < item.last_row; ++r) {
        row_ = p_.rows[static_cast<std::size_t>(r)];
        const std::vector<Tile>& tiles = plan_.tiles[static_cast<std::size_t>(r)];
        unwind(tiles, keep_states(tiles));
      }
    }
  }

 private:
  void load_parameters() {
    const auto matrix = [&](const Tensor& tensor, float* to) {
      stage(tensor, first_channel_ * tensor.stride(0), tensor.stride(1), tensor.stride(0), p_.d_state,
            channels_, to, s_.width, half_);
    };
    const auto vector = [&](const Tensor& tensor, float* to) {
      std::fill_n(to, s_.width, 0.0F);
      if (tensor)
        stage(tensor, first_channel_ * tensor.stride(0), 0, tensor.stride(0), 1, channels_, to, 0, 0);
    };
    matrix(p_.A, s_.A);
    if (p_.B.ndim() == 2) matrix(p_.B, s_.constant_b);
    if (p_.C.ndim() == 2) matrix(p_.C, s_.constant_c);
    vector(p_.delta_bias, s_.bias);
    vector(p_.D, s_.skip);
    scale_decay_rates(channels_, half_, s_.width, p_.complex, s_.A, s_.largest_a);
  }

  // Zero where the tensor is absent.
  void load_state(const Tensor& tensor, float* to) {
    std::fill_n(to, state_size_, 0.0F);
    if (tensor)
      stage(tensor, row_.state * tensor.stride(0) + first_channel_ * tensor.stride(1), tensor.stride(2),
            tensor.stride(1), p_.d_state, channels_, to, s_.width, half_);
  }

  // Leaves the states before each tile that needs them in the checkpoints and returns their number.
  std::int64_t keep_states(const std::vector<Tile>& tiles) {
    std::int64_t kept = 0;
    load_state(p_.initial_state, s_.h);
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      if (tiles[i].restart)
        std::fill_n(s_.h, state_size_, 0.0F);
      else if (i > 0)
        std::copy_n(s_.h, state_size_, s_.checkpoints + kept++ * state_size_);
      if (i + 1 == tiles.size() || tiles[i + 1].restart) continue;  // nobody asks for the state after it
      load_inputs<false>(tiles[i]);
      prefetch(tiles[i + 1], {p_.u, p_.delta});
      advance(tiles[i]);
    }
    return kept;
  }

  void unwind(const std::vector<Tile>& tiles, std::int64_t kept) {
    load_state(gradients_.dlast_state, s_.g);
    for (std::size_t i = tiles.size(); i-- > 0;) {
      const Tile& tile = tiles[i];
      if (tile.restart)
        std::fill_n(s_.h, state_size_, 0.0F);
      else if (i == 0)
        load_state(p_.initial_state, s_.h);
      else
        std::copy_n(s_.checkpoints + --kept * state_size_, state_size_, s_.h);
      load_inputs<true>(tile);
      load_gradients(tile);
      if (i > 0)
        prefetch(tiles[i - 1],
                 {p_.u, p_.delta, p_.z, gradients_.dout, gradients_.du, gradients_.ddelta, gradients_.dz});
      unwind(tile);
      finish(tile);
      if (tile.restart) std::fill_n(s_.g, state_size_, 0.0F);
    }
    if (gradients_.dinitial_state) {
      const Tensor& to = gradients_.dinitial_state;
      unstage(s_.g, s_.width, half_, to, row_.state * to.stride(0) + first_channel_ * to.stride(1),
              to.stride(2), to.stride(1), p_.d_state, channels_);
    }
  }

  [[nodiscard]] std::int64_t sequence_offset(const Tensor& tensor, std::int64_t step) const {
    return row_.batch * tensor.stride(0) + first_channel_ * tensor.stride(1) +
           p_.token(row_, step) * tensor.stride(2);
  }
  [[nodiscard]] std::int64_t step_stride(const Tensor& tensor) const {
    return p_.reverse ? -tensor.stride(2) : tensor.stride(2);
  }

  // The steps of `tile` and the channels of the block in a tensor of shape (B, D, L).
  void stage_sequence(const Tensor& tensor, const Tile& tile, float* to) {
    const std::int64_t offset = sequence_offset(tensor, tile.begin);
    for (std::int64_t c = 0; c < channels_; c += lanes())
      stage(tensor, offset + c * tensor.stride(1), step_stride(tensor), tensor.stride(1), tile.length,
            std::min(lanes(), channels_ - c), to + c * s_.steps, lanes(), 0);
  }

  void store_sequence(const float* from, const Tile& tile, const Tensor& tensor) {
    if (!tensor) return;
    const std::int64_t offset = sequence_offset(tensor, tile.begin);
    for (std::int64_t c = 0; c < channels_; c += lanes())
      unstage(from + c * s_.steps, lanes(), 0, tensor, offset + c * tensor.stride(1), step_stride(tensor),
              tensor.stride(1), tile.length, std::min(lanes(), channels_ - c));
  }

  void prefetch(const Tile& tile, std::initializer_list<Tensor> tensors) {
    for (const Tensor& tensor : tensors)
      if (tensor)
        simd::prefetch_tile(tensor.raw(), sequence_offset(tensor, tile.begin), step_stride(tensor),
                            tensor.stride(1), tile.length, channels_,
                            static_cast<std::int64_t>(size_of(tensor.dtype())));
  }

  // A variable B or C, (step, state); the imaginary half `steps` rows behind.
  void stage_factor(const Tensor& factor, const Tile& tile, float* to) {
    if (factor.ndim() == 2) return;
    const std::int64_t token = plan_.numbers() * factor.stride(3);
    for (std::int64_t part = 0; part < plan_.numbers(); ++part)
      simd::load_tile(factor.dtype(), factor.raw(),
                      row_.batch * factor.stride(0) + group_ * factor.stride(1) +
                          p_.token(row_, tile.begin) * token + part * factor.stride(3),
                      p_.reverse ? -token : token, factor.stride(2), tile.length, p_.d_state,
                      to + part * p_.d_state * s_.steps, p_.d_state);
  }

  // dt, u, x and B; kAll: the slope of dt, y and C too.
  template <bool kAll>
  void load_inputs(const Tile& tile) {
    const Tag d;
    stage_sequence(p_.u, tile, s_.u);
    stage_sequence(p_.delta, tile, s_.dt);
    stage_factor(p_.B, tile, s_.b);
    if (kAll) stage_factor(p_.C, tile, s_.c);
    for (std::int64_t c = 0; c < channels_; c += lanes()) {
      const V bias = hn::Load(d, s_.bias + c);
      const V skip = hn::Load(d, s_.skip + c);
      V largest = hn::Zero(d);
      for (std::int64_t at = c * s_.steps; at < c * s_.steps + tile.length * lanes(); at += lanes()) {
        const V delta = hn::Add(hn::Load(d, s_.dt + at), bias);
        const V dt = p_.delta_softplus ? simd::softplus(d, delta) : delta;
        const V u = hn::Load(d, s_.u + at);
        hn::Store(dt, d, s_.dt + at);
        hn::Store(hn::Mul(dt, u), d, s_.x + at);
        largest = larger(largest, hn::Abs(dt));
        if constexpr (kAll) {
          // Above 20, where softplus is the identity, the sigmoid rounds to 1.
          hn::Store(p_.delta_softplus ? simd::sigmoid(d, delta) : hn::Set(d, 1.0F), d, s_.slope + at);
          hn::Store(hn::Mul(skip, u), d, s_.y + at);
        }
      }
      hn::Store(largest, d, s_.largest_dt + c);
    }
    if (tile.padded) clear_padding(tile, {s_.dt, s_.u, s_.x, s_.slope, s_.y}, {s_.b, s_.c});
  }

  // dy, and what gates dz.
  void load_gradients(const Tile& tile) {
    const Tag d;
    stage_sequence(gradients_.dout, tile, s_.dy);
    if (p_.z) stage_sequence(p_.z, tile, s_.gate);
    const V one = hn::Set(d, 1.0F);
    for (std::int64_t c = 0; c < channels_; c += lanes()) {
      for (std::int64_t at = c * s_.steps; at < c * s_.steps + tile.length * lanes(); at += lanes()) {
        hn::Store(hn::Zero(d), d, s_.dx + at);
        hn::Store(hn::Zero(d), d, s_.ddt + at);
        if (!p_.z) continue;
        const V z = hn::Load(d, s_.gate + at);
        const V dout = hn::Load(d, s_.dy + at);
        const V sigmoid = simd::sigmoid(d, z);
        const V slope = hn::Mul(sigmoid, hn::MulAdd(z, hn::Sub(one, sigmoid), one));
        hn::Store(hn::Mul(dout, hn::Mul(z, sigmoid)), d, s_.dy + at);
        hn::Store(hn::Mul(dout, slope), d, s_.gate + at);
      }
    }
    if (tile.padded) clear_padding(tile, {s_.dy, s_.gate}, {});
  }

  // At padding all inputs become 0: the decay is 1 then, the state stays, and all gradients are 0.
  void clear_padding(const Tile& tile, std::initializer_list<float*> tiles,
                     std::initializer_list<float*> factors) {
    for (std::int64_t i = 0; i < tile.length; ++i) {
      if (sequence_of(p_, row_, tile.begin + i) >= 0) continue;
      for (float* array : tiles)
        for (std::int64_t c = 0; c < channels_; c += lanes())
          std::fill_n(array + c * s_.steps + i * lanes(), lanes(), 0.0F);
      for (float* factor : factors)
        for (std::int64_t part = 0; part < plan_.numbers(); ++part)
          std::fill_n(factor + (part * s_.steps + i) * p_.d_state, p_.d_state, 0.0F);
    }
  }

  [[nodiscard]] Strip strip_at(const Tile& tile, std::int64_t c) const {
    const std::int64_t at = c * s_.steps;
    return {tile.length, s_.dt + at, s_.x + at, s_.dy + at, s_.y + at, s_.dx + at, s_.ddt + at};
  }

  // States from n on of B or C at channel c.
  [[nodiscard]] Factor factor_from(const Tensor& factor, const float* variable, const float* constant,
                                   std::int64_t n, std::int64_t c) const {
    return factor.ndim() == 4 ? Factor{variable + n, p_.d_state, p_.d_state * s_.steps}
                              : Factor{constant + n * s_.width + c, 0, half_};
  }

  [[nodiscard]] bool is_bounded(std::int64_t c) const {
    const Tag d;
    const V reach = hn::Mul(hn::Load(d, s_.largest_dt + c), hn::Load(d, s_.largest_a + c));
    return hn::AllTrue(d, hn::Le(reach, hn::Set(d, 126.0F)));
  }

  // Calls f(number of states as a type, first state) for all states.
  template <typename F>
  void for_states(const F& f) {
    constexpr int kMany = kStatesTogether;
    std::int64_t n = 0;
    if (!p_.complex)
      for (; n + kMany <= p_.d_state; n += kMany) f(std::integral_constant<int, kMany>{}, n);
    for (; n < p_.d_state; ++n) f(std::integral_constant<int, 1>{}, n);
  }

  void advance(const Tile& tile) {
    with_bool(p_.B.ndim() == 2, [&](auto constant_b) {
      constexpr bool kB = decltype(constant_b)::value;
      for (std::int64_t c = 0; c < channels_; c += lanes()) {
        const Strip strip = strip_at(tile, c);
        with_bool(is_bounded(c), [&](auto bounded) {
          for_states([&](auto states, std::int64_t n) {
            const std::int64_t at = n * s_.width + c;
            const Factor b = factor_from(p_.B, s_.b, s_.constant_b, n, c);
            if (p_.complex)
              advance_complex<kB>(strip, s_.A + at, s_.h + at, half_, b);
            else
              advance_real<decltype(states)::value, decltype(bounded)::value, kB>(strip, s_.A + at, s_.h + at,
                                                                                  s_.width, b);
          });
        });
      }
    });
  }

  // Recomputes and unwinds the states a few at a time, each over all channels of the block.
  void unwind(const Tile& tile) {
    with_bool(p_.B.ndim() == 2, [&](auto constant_b) {
      with_bool(p_.C.ndim() == 2, [&](auto constant_c) {
        for_states([&](auto states, std::int64_t n) {
          unwind_states<decltype(states)::value, decltype(constant_b)::value, decltype(constant_c)::value>(
              tile, n);
        });
      });
    });
  }

  template <int kStates, bool kConstantB, bool kConstantC>
  void unwind_states(const Tile& tile, std::int64_t n) {
    const std::int64_t numbers = kStates * plan_.numbers();
    if (!kConstantB) std::fill_n(s_.db, tile.length * numbers * lanes(), 0.0F);
    if (!kConstantC) std::fill_n(s_.dc, tile.length * numbers * lanes(), 0.0F);
    const Record record = {s_.decay, s_.carried};
    for (std::int64_t c = 0; c < channels_; c += lanes()) {
      const std::int64_t at = n * s_.width + c;
      const Strip strip = strip_at(tile, c);
      const Factor b = factor_from(p_.B, s_.b, s_.constant_b, n, c);
      const Factor factor_c = factor_from(p_.C, s_.c, s_.constant_c, n, c);
      float* const db = kConstantB ? sums_.dB + at : s_.db;
      float* const dc = kConstantC ? sums_.dC + at : s_.dc;
      if constexpr (kStates == 1) {
        if (p_.complex) {
          record_complex<kConstantB, kConstantC>(strip, s_.A + at, s_.h + at, half_, b, factor_c, record, dc);
          unwind_complex<kConstantB, kConstantC>(strip, s_.A + at, s_.g + at, sums_.dA + at, half_, b,
                                                 factor_c, record, db);
          continue;
        }
      }
      with_bool(is_bounded(c), [&](auto bounded) {
        record_real<kStates, decltype(bounded)::value, kConstantB, kConstantC>(
            strip, s_.A + at, s_.h + at, s_.width, b, factor_c, record, dc);
      });
      unwind_real<kStates, kConstantB, kConstantC>(strip, s_.A + at, s_.g + at, sums_.dA + at, s_.width, b,
                                                   factor_c, record, db);
    }
    if (!kConstantB) add_tokens(s_.db, tile, n, numbers, plan_.dB);
    if (!kConstantC) add_tokens(s_.dc, tile, n, numbers, plan_.dC);
  }

  // Sums `values` (step, number, lane) over the lanes and adds them to those of states n on of the tile's
  // tokens.
  void add_tokens(const float* values, const Tile& tile, std::int64_t n, std::int64_t numbers, float* to) {
    if (to == nullptr) return;
    sum_lanes(values, tile.length * numbers, s_.totals);
    const std::int64_t first = segment_ * plan_.tokens() + row_.batch * p_.u.size(2);
    const std::int64_t apart = p_.complex ? p_.d_state : 1;
    for (std::int64_t step = 0; step < tile.length; ++step) {
      float* const sums = to + (first + p_.token(row_, tile.begin + step)) * plan_.token_size() +
                          group_ * plan_.numbers() * p_.d_state + n;
      const float* const totals = s_.totals + step * numbers;
      for (std::int64_t k = 0; k < numbers; ++k)
        sums[k * apart] = first_of_segment_ ? totals[k] : sums[k * apart] + totals[k];
    }
  }

  void finish(const Tile& tile) {
    const Tag d;
    const V log_2 = hn::Set(d, 1.0F / kLog2E);
    for (std::int64_t c = 0; c < channels_; c += lanes()) {
      const V skip = hn::Load(d, s_.skip + c);
      V sum_skip = hn::Load(d, sums_.dD + c);
      V sum_bias = hn::Load(d, sums_.ddelta_bias + c);
      for (std::int64_t at = c * s_.steps; at < c * s_.steps + tile.length * lanes(); at += lanes()) {
        const V u = hn::Load(d, s_.u + at);
        const V dy = hn::Load(d, s_.dy + at);
        const V dx = hn::Load(d, s_.dx + at);
        const V du = hn::MulAdd(hn::Load(d, s_.dt + at), dx, hn::Mul(skip, dy));
        const V ddt = hn::MulAdd(u, dx, hn::Mul(log_2, hn::Load(d, s_.ddt + at)));
        const V ddelta = hn::Mul(ddt, hn::Load(d, s_.slope + at));
        hn::Store(du, d, s_.dx + at);
        hn::Store(ddelta, d, s_.ddt + at);
        hn::Store(hn::Mul(hn::Load(d, s_.gate + at), hn::Load(d, s_.y + at)), d, s_.y + at);
        sum_skip = hn::MulAdd(dy, u, sum_skip);
        sum_bias = hn::Add(sum_bias, ddelta);
      }
      hn::Store(sum_skip, d, sums_.dD + c);
      hn::Store(sum_bias, d, sums_.ddelta_bias + c);
    }
    store_sequence(s_.dx, tile, gradients_.du);
    store_sequence(s_.ddt, tile, gradients_.ddelta);
    store_sequence(s_.y, tile, gradients_.dz);
  }

  const BackwardPlan& plan_;
  const Problem& p_;
  const Gradients& gradients_;
  BackwardScratch s_;
  std::int64_t half_;  // from the real to the imaginary half of matrices
  std::int64_t state_size_;
  BlockSums sums_{nullptr, 0, 0};
  std::int64_t group_ = 0;
  std::int64_t first_channel_ = 0;
  std::int64_t channels_ = 0;
  std::int64_t segment_ = 0;
  bool first_of_segment_ = false;
  Row row_;
};

// Calls next(item) until it returns false.
void run_items(const BackwardPlan& plan, const BackwardScratch& scratch, bool (*next)(void*, BackwardItem&),
               void* state) {
  Worker worker(plan, scratch);
  for (BackwardItem item; next(state, item);) worker.run(item);
}

}  // namespace
}  // namespace krait::scan::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::scan {
namespace {
HWY_EXPORT(run_items);

// Hands out the items, one by one.
struct Queue {
  const BackwardPlan& plan;
  std::atomic<std::int64_t> taken = 0;

  [[nodiscard]] std::int64_t count() const {
    return plan.division.parts * plan.problem.groups * plan.division.segments;
  }
  // The first row of a part: parts have about the same number of tokens.
  [[nodiscard]] std::int64_t first_row(std::int64_t part) const {
    if (part == plan.division.parts) return std::ssize(plan.problem.rows);
    const auto before = [&](const Row& row, std::int64_t token) {
      return row.batch * plan.problem.u.size(2) + row.begin < token;
    };
    return std::lower_bound(plan.problem.rows.begin(), plan.problem.rows.end(),
                            plan.tokens() * part / plan.division.parts, before) -
           plan.problem.rows.begin();
  }
  static bool next(void* self, BackwardItem& item) {
    auto& queue = *static_cast<Queue*>(self);
    const std::int64_t index = queue.taken.fetch_add(1, std::memory_order_relaxed);
    if (index >= queue.count()) return false;
    const Division& division = queue.plan.division;
    item.segment = index % division.segments;
    item.group = index / division.segments % queue.plan.problem.groups;
    item.part = index / (division.segments * queue.plan.problem.groups);
    item.first_row = queue.first_row(item.part);
    item.last_row = queue.first_row(item.part + 1);
    item.first_block = item.segment * division.deep;
    item.last_block = std::min(item.first_block + division.deep, division.blocks);
    return true;
  }
};

}  // namespace

void run_simd_backward(Context& ctx, const Problem& p, const Gradients& gradients) {
  if (p.channels == 0 || p.rows.empty()) return;
  BackwardPlan plan{.problem = p, .gradients = gradients};
  plan.division = divide_backward(std::ssize(p.rows), p.groups, p.channels / p.groups);
  plan.steps = choose_backward_steps(p.d_state, p.complex);
  plan.width = (plan.division.block + 15) / 16 * 16;
  BackwardScratch scratch{.steps = plan.steps, .width = plan.width, .d_state = p.d_state};
  for (const Row& row : p.rows) {
    plan.tiles.push_back(cut_into_tiles(p, row, plan.steps));
    scratch.states_kept = std::max(scratch.states_kept, std::ssize(plan.tiles.back()) - 1);
  }

  const Tensor blocks = ctx.empty({plan.division.parts * plan.block_count(), plan.block_size()});
  plan.blocks = blocks.data<float>();
  const auto sums_of = [&](const Tensor& gradient) {
    return gradient && gradient.ndim() == 4
               ? ctx.empty({plan.division.segments * plan.tokens(), plan.token_size()})
               : Tensor();
  };
  const Tensor dB = sums_of(gradients.dB);
  const Tensor dC = sums_of(gradients.dC);
  if (dB) plan.dB = dB.data<float>();
  if (dC) plan.dC = dC.data<float>();

  // Below some ten microseconds a second thread costs more than it gives.
  constexpr std::int64_t kSmall = 25'000;
  const bool small = plan.tokens() * p.channels * (p.d_state + 4) < kSmall;
  Queue queue{plan};
  const std::int64_t workers = std::min<std::int64_t>(small ? 1 : ctx.threads(), queue.count());
  const std::int64_t floats = scratch.place(nullptr);
  const Tensor memory = ctx.empty({workers, floats});
  parallel_for(ctx, workers, 1, [&](std::int64_t begin, std::int64_t) {
    BackwardScratch own = scratch;
    own.place(memory.data<float>() + begin * floats);
    HWY_DYNAMIC_DISPATCH(run_items)(plan, own, &Queue::next, &queue);
  });

  parallel_for(ctx, plan.block_count(), small ? plan.block_count() : 4,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) finish_block(plan, i);
               });
  if (!dB && !dC) return;
  constexpr std::int64_t kTokens = 64;
  const std::int64_t length = p.u.size(2);
  const std::int64_t pieces = (length + kTokens - 1) / kTokens;
  parallel_for(ctx, p.u.size(0) * pieces, small ? p.u.size(0) * pieces : 1,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const std::int64_t first = i % pieces * kTokens;
                   finish_tokens(plan, i / pieces, first, std::min(first + kTokens, length));
                 }
               });
}

}  // namespace krait::scan
#endif  // HWY_ONCE
