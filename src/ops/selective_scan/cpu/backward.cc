// The SIMD backward: lanes over channels, like the forward. A worker takes a block of channels and walks its
// tokens in tiles, twice: forward to keep the state before each tile, then from the last tile to the first,
// where the states of the tile are recomputed, a few at a time, and unwound while they are in the cache.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/selective_scan/cpu/backward.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/selective_scan/backward.h"
#include "ops/selective_scan/cpu/backward-inl.h"
#include "ops/selective_scan/cpu/lanes-inl.h"
#include "ops/selective_scan/cpu/strips-inl.h"
#include "ops/selective_scan/scan.h"

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {
namespace {

static_assert(kFields == kStripSize && kParts * kStatesTogether * kLanes == kRecordSize);

class Worker {
 public:
  Worker(const BackwardPlan& plan, const BackwardScratch& scratch)
      : plan_(plan),
        p_(plan.problem),
        gradients_(plan.gradients),
        s_(scratch),
        half_(p_.d_state * s_.width),
        strip_(s_.steps * kFields * lanes() + BackwardScratch::kGap),
        state_size_(plan.numbers() * half_) {
    std::fill_n(s_.strips, s_.fixed, 0.0F);
  }

  void run(const BackwardItem& item) {
    const std::int64_t in_group = p_.channels / p_.groups;
    for (std::int64_t block = item.first_block; block < item.last_block; ++block) {
      const std::int64_t first = block * plan_.division.block;
      group_ = item.group;
      first_channel_ = item.group * in_group + first;
      channels_ = std::min(plan_.division.block, in_group - first);
      // Lanes beyond the last channel compute on zeros, for the sums over lanes.
      if (channels_ % lanes() != 0) std::fill_n(s_.strips, s_.fixed, 0.0F);
      load_parameters();
      float* const memory = plan_.block_at(item.part, item.group, block);
      std::fill_n(memory, plan_.block_size(), 0.0F);
      sums_.place(memory, p_, s_.width);
      first_of_segment_ = block == item.first_block;
      segment_ = item.segment;
      for (std::int64_t r = item.first_row; r < item.last_row; ++r) {
        row_ = p_.rows[static_cast<std::size_t>(r)];
        load_row();
        const std::vector<Tile>& tiles = plan_.tiles[static_cast<std::size_t>(r)];
        if (!gradients_.checkpoints) keep_states(tiles);
        unwind(tiles);
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

  // State `index` of a tensor (index, D, N); zero where it is absent.
  void load_state(const Tensor& tensor, std::int64_t index, float* to) {
    std::fill_n(to, state_size_, 0.0F);
    if (tensor)
      stage(tensor, index * tensor.stride(0) + first_channel_ * tensor.stride(1), tensor.stride(2),
            tensor.stride(1), p_.d_state, channels_, to, s_.width, half_);
  }

  // Leaves the states before each tile that has a checkpoint in the scratch memory.
  void keep_states(const std::vector<Tile>& tiles) {
    std::int64_t kept = 0;
    load_state(p_.initial_state, row_.state, s_.h);
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      if (tiles[i].restart) std::fill_n(s_.h, state_size_, 0.0F);
      if (tiles[i].checkpoint >= 0) std::copy_n(s_.h, state_size_, s_.checkpoints + kept++ * state_size_);
      if (i + 1 == tiles.size() || tiles[i + 1].checkpoint < 0)
        continue;  // nobody asks for the state after it
      load_inputs(tiles[i]);
      next_ = tiles[i + 1];
      next_is_whole_ = i + 2 == tiles.size();
      written_ = {};
      advance(tiles[i]);
    }
    kept_ = kept;
  }

  void unwind(const std::vector<Tile>& tiles) {
    load_state(gradients_.dlast_state, row_.state, s_.g);
    for (std::size_t i = tiles.size(); i-- > 0;) {
      const Tile& tile = tiles[i];
      if (tile.restart)
        std::fill_n(s_.h, state_size_, 0.0F);
      else if (tile.checkpoint < 0)
        load_state(p_.initial_state, row_.state, s_.h);
      else if (gradients_.checkpoints)
        load_state(gradients_.checkpoints, tile.checkpoint, s_.h);
      else
        std::copy_n(s_.checkpoints + --kept_ * state_size_, state_size_, s_.h);
      load_all(tile);
      next_ = i > 0 ? tiles[i - 1] : Tile{};
      next_is_whole_ = true;
      written_ = tile;
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

  // The channels of the block along the row.
  [[nodiscard]] Steps steps_of(const Tensor& tensor) const {
    if (!tensor) return {};
    const std::int64_t first = row_.length > 0 ? p_.token(row_, 0) : 0;
    return {.dtype = tensor.dtype(),
            .data = tensor.raw(),
            .offset =
                row_.batch * tensor.stride(0) + first_channel_ * tensor.stride(1) + first * tensor.stride(2),
            .step_stride = p_.reverse ? -tensor.stride(2) : tensor.stride(2),
            .channel_stride = tensor.stride(1),
            .channels = channels_};
  }

  void load_row() {
    u_ = steps_of(p_.u);
    delta_ = steps_of(p_.delta);
    z_ = steps_of(p_.z);
    dout_ = steps_of(gradients_.dout);
    du_ = steps_of(gradients_.du);
    ddelta_ = steps_of(gradients_.ddelta);
    dz_ = steps_of(gradients_.dz);
  }

  // Asks for share `index` of `count` of what comes next: spread over the computation, since a burst of
  // requests waits for memory like the loads would.
  void prefetch(std::int64_t index, std::int64_t count) const {
    const auto ask = [&](const Tile& tile, const Steps& steps) {
      steps.prefetch(tile.begin, tile.begin + tile.length, index, count);
    };
    for (const Steps* steps : {&u_, &delta_}) ask(next_, *steps);
    if (next_is_whole_)
      for (const Steps* steps : {&z_, &dout_}) ask(next_, *steps);
    for (const Steps* steps : {&du_, &ddelta_, &dz_}) ask(written_, *steps);
  }

  // Calls f(steps before these, number of steps) for a few steps of the tile at a time: their rows stay in
  // the first-level cache between copying and computing.
  template <typename F>
  static void for_steps(const Tile& tile, const F& f) {
    constexpr std::int64_t kSteps = 8;
    for (std::int64_t begin = 0; begin < tile.length; begin += kSteps)
      f(begin, std::min(kSteps, tile.length - begin));
  }
  [[nodiscard]] std::int64_t strips() const { return (channels_ + lanes() - 1) / lanes(); }
  // Calls f(channel, strip from `step` on) for each vector of channels.
  template <typename F>
  void for_strips(std::int64_t step, const F& f) const {
    float* strip = s_.strips + step * kFields * lanes();
    for (std::int64_t c = 0; c < channels_; c += lanes(), strip += strip_) f(c, strip);
  }

  void load(const Steps& from, const Tile& tile, std::int64_t begin, std::int64_t steps, Field to) {
    from.load(tile.begin + begin, tile.begin + begin + steps, s_.strips + (begin * kFields + to) * lanes(),
              strip_);
  }
  void store(Field from, const Tile& tile, std::int64_t begin, std::int64_t steps, const Steps& to) {
    to.store(s_.strips + (begin * kFields + from) * lanes(), strip_, tile.begin + begin,
             tile.begin + begin + steps);
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

  // dt, x and B.
  void load_inputs(const Tile& tile) {
    const Tag d;
    stage_factor(p_.B, tile, s_.b);
    for_steps(tile, [&](std::int64_t begin, std::int64_t steps) {
      load(delta_, tile, begin, steps, kDt);
      load(u_, tile, begin, steps, kU);
      for_strips(begin, [&](std::int64_t c, float* strip) {
        complete_dt(strip, steps, p_.delta_softplus, hn::Load(d, s_.bias + c), false);
        start_sums(strip, steps, hn::Zero(d));
      });
    });
    if (tile.padded) clear_padding(tile);
    note_bounds(tile);
  }

  // All inputs of a tile, and what depends on them without the states.
  void load_all(const Tile& tile) {
    const Tag d;
    stage_factor(p_.B, tile, s_.b);
    stage_factor(p_.C, tile, s_.c);
    for_steps(tile, [&](std::int64_t begin, std::int64_t steps) {
      load(delta_, tile, begin, steps, kDt);
      load(u_, tile, begin, steps, kU);
      load(dout_, tile, begin, steps, kDy);
      if (p_.z) load(z_, tile, begin, steps, kGate);
      for_strips(begin, [&](std::int64_t c, float* strip) {
        complete_dt(strip, steps, p_.delta_softplus, hn::Load(d, s_.bias + c), true);
        if (p_.z) complete_gate(strip, steps);
        start_sums(strip, steps, hn::Load(d, s_.skip + c));
      });
    });
    if (tile.padded) clear_padding(tile);
    note_bounds(tile);
  }

  // At padding all inputs become 0: the decay is 1 then, the state stays, and all gradients are 0.
  void clear_padding(const Tile& tile) {
    for (std::int64_t i = 0; i < tile.length; ++i) {
      if (sequence_of(p_, row_, tile.begin + i) >= 0) continue;
      for_strips(i, [](std::int64_t, float* step) { std::fill_n(step, kFields * lanes(), 0.0F); });
      for (float* factor : {s_.b, s_.c})
        for (std::int64_t part = 0; part < plan_.numbers(); ++part)
          std::fill_n(factor + (part * s_.steps + i) * p_.d_state, p_.d_state, 0.0F);
    }
  }

  // Notes of each strip whether all its exponents lie within +-126.
  void note_bounds(const Tile& tile) {
    const Tag d;
    for_strips(0, [&](std::int64_t c, const float* strip) {
      V largest = hn::Zero(d);
      for (std::int64_t i = 0; i < tile.length; ++i)
        largest = larger(largest, hn::Abs(field(strip + i * kFields * lanes(), kDt)));
      const V reach = hn::Mul(largest, hn::Load(d, s_.largest_a + c));
      bounded_[c / lanes()] = hn::AllTrue(d, hn::Le(reach, hn::Set(d, 126.0F)));
    });
  }

  // States from n on of B or C at channel c.
  [[nodiscard]] Factor factor_from(const Tensor& factor, const float* variable, const float* constant,
                                   std::int64_t n, std::int64_t c) const {
    return factor.ndim() == 4 ? Factor{variable + n, p_.d_state, p_.d_state * s_.steps}
                              : Factor{constant + n * s_.width + c, 0, half_};
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
      for_strips(0, [&](std::int64_t c, const float* strip) {
        prefetch(c / lanes(), strips());
        with_bool(bounded_[c / lanes()], [&](auto bounded) {
          for_states([&](auto states, std::int64_t n) {
            const std::int64_t at = n * s_.width + c;
            const Factor b = factor_from(p_.B, s_.b, s_.constant_b, n, c);
            if (p_.complex)
              advance_complex<kB>(strip, tile.length, s_.A + at, s_.h + at, half_, b);
            else
              advance_real<decltype(states)::value, decltype(bounded)::value, kB>(
                  strip, tile.length, s_.A + at, s_.h + at, s_.width, b);
          });
        });
      });
    });
  }

  // Recomputes and unwinds the states a few at a time, each over all channels of the block.
  void unwind(const Tile& tile) {
    with_bool(p_.B.ndim() == 2, [&](auto constant_b) {
      with_bool(p_.C.ndim() == 2, [&](auto constant_c) {
        for_states([&](auto states, std::int64_t n) {
          unwind_from<decltype(states)::value, decltype(constant_b)::value, decltype(constant_c)::value>(tile,
                                                                                                         n);
        });
      });
    });
  }

  template <int kStates, bool kConstantB, bool kConstantC>
  void unwind_from(const Tile& tile, std::int64_t n) {
    const std::int64_t numbers = kStates * plan_.numbers();
    const std::int64_t record_step = kParts * numbers * lanes();
    for_strips(0, [&](std::int64_t c, float* strip) {
      prefetch(n / kStates * strips() + c / lanes(), (p_.d_state + kStates - 1) / kStates * strips());
      const Record record = {s_.record, c == 0 ? s_.zeros : s_.record, c == 0 ? 0 : record_step};
      const std::int64_t at = n * s_.width + c;
      const Factor B = factor_from(p_.B, s_.b, s_.constant_b, n, c);
      const Factor C = factor_from(p_.C, s_.c, s_.constant_c, n, c);
      if constexpr (kStates == 1) {
        if (p_.complex) {
          record_complex<kConstantB, kConstantC>(strip, tile.length, s_.A + at, s_.h + at, half_, B, C,
                                                 record, sums_.dC + at);
          unwind_complex<kConstantB, kConstantC>(strip, tile.length, s_.A + at, s_.g + at, sums_.dA + at,
                                                 half_, B, C, record, sums_.dB + at);
          return;
        }
      }
      with_bool(bounded_[c / lanes()], [&](auto bounded) {
        record_decays<kStates, decltype(bounded)::value>(strip, tile.length, s_.A + at, s_.width, s_.record);
      });
      record_states<kStates, kConstantB, kConstantC>(strip, tile.length, s_.h + at, s_.width, B, C, record,
                                                     sums_.dC + at);
      unwind_states<kStates, kConstantB, kConstantC>(strip, tile.length, s_.A + at, s_.g + at, sums_.dA + at,
                                                     s_.width, B, C, record, sums_.dB + at);
    });
    if (!kConstantB) add_tokens(kToB, tile, n, numbers, plan_.dB);
    if (!kConstantC) add_tokens(kToC, tile, n, numbers, plan_.dC);
  }

  // Sums a part of the record over lanes and adds it to the sums of states n on at the tokens of the tile.
  void add_tokens(Part part, const Tile& tile, std::int64_t n, std::int64_t numbers, float* to) {
    if (to == nullptr) return;
    const std::int64_t first = segment_ * plan_.tokens() + row_.batch * p_.u.size(2);
    const std::int64_t step_size = p_.reverse ? -plan_.token_size() : plan_.token_size();
    const std::int64_t apart = p_.complex ? p_.d_state : 1;
    float* sums = to + (first + p_.token(row_, tile.begin)) * plan_.token_size() +
                  group_ * plan_.numbers() * p_.d_state + n;
    const float* record = s_.record + part * numbers * lanes();
    for (std::int64_t i = 0; i < tile.length; ++i, sums += step_size, record += kParts * numbers * lanes()) {
      float totals[kStatesTogether];
      sum_lanes(record, numbers, totals);
      for (std::int64_t k = 0; k < numbers; ++k)
        sums[k * apart] = first_of_segment_ ? totals[k] : sums[k * apart] + totals[k];
    }
  }

  void finish(const Tile& tile) {
    const Tag d;
    for_steps(tile, [&](std::int64_t begin, std::int64_t steps) {
      for_strips(begin, [&](std::int64_t c, float* strip) {
        complete_gradients(strip, steps, hn::Load(d, s_.skip + c), sums_.dD + c, sums_.ddelta_bias + c);
      });
      store(kDx, tile, begin, steps, du_);
      store(kDdt, tile, begin, steps, ddelta_);
      store(kY, tile, begin, steps, dz_);
    });
  }

  const BackwardPlan& plan_;
  const Problem& p_;
  const Gradients& gradients_;
  BackwardScratch s_;
  std::int64_t half_;   // from the real to the imaginary half of matrices
  std::int64_t strip_;  // from one strip to the next
  std::int64_t state_size_;
  std::array<bool, kWidestBlock> bounded_{};
  BlockSums sums_;
  std::int64_t group_ = 0;
  std::int64_t first_channel_ = 0;
  std::int64_t channels_ = 0;
  std::int64_t segment_ = 0;
  bool first_of_segment_ = false;
  std::int64_t kept_ = 0;  // states in the scratch memory
  Row row_;
  Tile next_;                   // inputs of these steps are prefetched
  bool next_is_whole_ = false;  // those of the way back too
  Tile written_;                // destinations of these steps are prefetched
  Steps u_;
  Steps delta_;
  Steps z_;
  Steps dout_;
  Steps du_;
  Steps ddelta_;
  Steps dz_;
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
  if (p.rows.empty()) return;
  BackwardPlan plan{.problem = p, .gradients = gradients};
  plan.division = divide_backward(std::ssize(p.rows), p.groups, p.channels / p.groups);
  plan.steps = choose_backward_steps(p.d_state, p.complex);
  plan.width = (plan.division.block + 15) / 16 * 16;
  BackwardScratch scratch{.steps = plan.steps, .width = plan.width, .d_state = p.d_state};
  plan.tiles = cut_into_tiles(p, plan.steps);
  if (!gradients.checkpoints)
    for (const std::vector<Tile>& tiles : plan.tiles)
      scratch.states_kept = std::max(scratch.states_kept, std::ssize(tiles));

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
