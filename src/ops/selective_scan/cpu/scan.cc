// The SIMD path: lanes over channels. A worker takes a block of channels of one row and walks its tokens in
// tiles: u and delta are staged as f32 tiles (step, channel) in the first-level cache, B and C as (step,
// state); then each vector of channels walks the steps of the tile, a few states at a time in registers,
// and gathers y; last, y is gated and stored.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/selective_scan/cpu/scan.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"
#include "core/simd/math-inl.h"
#include "core/simd/tile-inl.h"
#include "ops/selective_scan/cpu/lanes-inl.h"
#include "ops/selective_scan/cpu/walk-inl.h"
#include "ops/selective_scan/scan.h"

#ifndef KRAIT_OPS_SELECTIVE_SCAN_CPU_SCAN_ONCE
#define KRAIT_OPS_SELECTIVE_SCAN_CPU_SCAN_ONCE
namespace krait::scan {

// A block of channels of one row.
struct Item {
  std::int64_t row = 0;
  std::int64_t group = 0;
  std::int64_t first_channel = 0;
  std::int64_t channels = 0;
};

// A worker's memory, in floats. Rows of channels are `width` apart. The imaginary halves of complex
// values follow the real ones.
struct Scratch {
  std::int64_t steps = 0;  // of a tile
  std::int64_t width = 0;  // a multiple of every vector
  std::int64_t d_state = 0;
  float* dt = nullptr;          // (step, channel)
  float* du = nullptr;          // (step, channel): dt u
  float* y = nullptr;           // (step, channel)
  float* A = nullptr;           // (state, channel): log2(e) A; imaginary half in quarter turns
  float* h = nullptr;           // (state, channel)
  float* constant_b = nullptr;  // (state, channel)
  float* constant_c = nullptr;
  float* bias = nullptr;  // (channel)
  float* skip = nullptr;
  float* largest_a = nullptr;   // (channel): |A| over the states
  float* largest_dt = nullptr;  // (channel): |dt| over the steps of the tile
  float* b = nullptr;           // (step, state)
  float* c = nullptr;

  // Lays the arrays out from `memory` on (null: only counts) and returns how many floats they take.
  std::int64_t place(float* memory) {
    std::int64_t floats = 0;
    const auto take = [&](float*& array, std::int64_t size) {
      if (memory != nullptr) array = memory + floats;
      floats += size;
    };
    for (float** tile : {&dt, &du, &y}) take(*tile, steps * width);
    for (float** matrix : {&A, &h, &constant_b, &constant_c}) take(*matrix, 2 * d_state * width);
    for (float** vector : {&bias, &skip, &largest_a, &largest_dt}) take(*vector, width);
    for (float** factor : {&b, &c}) take(*factor, 2 * d_state * steps);
    return (floats + 15) / 16 * 16;
  }
};

}  // namespace krait::scan
#endif

HWY_BEFORE_NAMESPACE();
namespace krait::scan::HWY_NAMESPACE {
namespace {

class Worker {
 public:
  Worker(const Problem& problem, const Scratch& scratch, std::int64_t floats)
      : p_(problem), s_(scratch), half_(problem.d_state * scratch.width) {
    std::fill_n(s_.dt, floats, 0.0F);  // channels beyond the last one compute harmless numbers
  }

  void run(const Item& item) {
    item_ = item;
    row_ = p_.rows[static_cast<std::size_t>(item.row)];
    load_parameters();
    if (p_.initial_state)
      stage_state(p_.initial_state);
    else
      std::fill_n(s_.h, 2 * half_, 0.0F);
    Walk walk(p_, item.row, s_.steps);
    for (Span span; walk.next(span);) {
      if (span.restart) std::fill_n(s_.h, 2 * half_, 0.0F);
      if (span.padding) {
        std::fill_n(s_.y, span.length * s_.width, 0.0F);
      } else {
        load_tile(span);
        advance(span);
        if (p_.z) gate(span);
      }
      store_output(span);
      for (const Save& save : span.saves)
        store_state(save.checkpoint ? p_.checkpoints : p_.states.select(0, row_.batch), save.slot);
    }
    if (p_.last_state) store_state(p_.last_state, row_.state);
  }

 private:
  void load_parameters() {
    const std::int64_t c0 = item_.first_channel;
    const auto matrix = [&](const Tensor& tensor, float* to) {
      stage(tensor, c0 * tensor.stride(0), tensor.stride(1), tensor.stride(0), p_.d_state, item_.channels, to,
            s_.width, half_);
    };
    const auto vector = [&](const Tensor& tensor, float* to) {
      std::fill_n(to, s_.width, 0.0F);
      if (tensor) stage(tensor, c0 * tensor.stride(0), 0, tensor.stride(0), 1, item_.channels, to, 0, 0);
    };
    matrix(p_.A, s_.A);
    if (p_.B.ndim() == 2) matrix(p_.B, s_.constant_b);
    if (p_.C.ndim() == 2) matrix(p_.C, s_.constant_c);
    vector(p_.delta_bias, s_.bias);
    vector(p_.D, s_.skip);
    scale_decay_rates(item_.channels, half_, s_.width, p_.complex, s_.A, s_.largest_a);
  }

  void stage_state(const Tensor& tensor) {
    stage(tensor, row_.state * tensor.stride(0) + item_.first_channel * tensor.stride(1), tensor.stride(2),
          tensor.stride(1), p_.d_state, item_.channels, s_.h, s_.width, half_);
  }

  void store_state(const Tensor& tensor, std::int64_t index) {
    unstage(s_.h, s_.width, half_, tensor, index * tensor.stride(0) + item_.first_channel * tensor.stride(1),
            tensor.stride(2), tensor.stride(1), p_.d_state, item_.channels);
  }

  // The steps of `span` and the channels of the item in a tensor of shape (B, D, L).
  void stage_sequence(const Tensor& tensor, const Span& span, float* to) {
    const std::int64_t step = p_.reverse ? -tensor.stride(2) : tensor.stride(2);
    stage(tensor, sequence_offset(tensor, span.begin), step, tensor.stride(1), span.length, item_.channels,
          to, s_.width, 0);
  }

  [[nodiscard]] std::int64_t sequence_offset(const Tensor& tensor, std::int64_t step) const {
    return row_.batch * tensor.stride(0) + item_.first_channel * tensor.stride(1) +
           p_.token(row_, step) * tensor.stride(2);
  }

  // Asks for share `index` of `count` of the steps that follow `span`: the distance between rows of a
  // channel-last tensor is beyond what hardware foresees. Spread over the computation, since a burst of
  // requests waits for memory like the loads would.
  void prefetch_after(const Span& span, std::int64_t index, std::int64_t count) {
    const std::int64_t after = span.begin + span.length;
    const std::int64_t steps = std::min(s_.steps, row_.length - after);
    const std::int64_t begin = after + steps * index / count;
    const std::int64_t end = after + steps * (index + 1) / count;
    if (begin == end) return;
    for (const Tensor* tensor : {&p_.u, &p_.delta, &p_.z, &p_.out}) {
      if (!*tensor) continue;
      simd::prefetch_tile(tensor->raw(), sequence_offset(*tensor, begin),
                          p_.reverse ? -tensor->stride(2) : tensor->stride(2), tensor->stride(1), end - begin,
                          item_.channels, static_cast<std::int64_t>(size_of(tensor->dtype())));
    }
  }

  // A variable B or C, (step, state).
  void stage_factor(const Tensor& factor, const Span& span, float* to) {
    const std::int64_t parts = p_.complex ? 2 : 1;
    const std::int64_t token = parts * factor.stride(3);
    for (std::int64_t part = 0; part < parts; ++part)
      simd::load_tile(factor.dtype(), factor.raw(),
                      row_.batch * factor.stride(0) + item_.group * factor.stride(1) +
                          p_.token(row_, span.begin) * token + part * factor.stride(3),
                      p_.reverse ? -token : token, factor.stride(2), span.length, p_.d_state,
                      to + part * p_.d_state * s_.steps, p_.d_state);
  }

  void load_tile(const Span& span) {
    const Tag d;
    stage_sequence(p_.u, span, s_.du);
    stage_sequence(p_.delta, span, s_.dt);
    if (p_.B.ndim() == 4) stage_factor(p_.B, span, s_.b);
    if (p_.C.ndim() == 4) stage_factor(p_.C, span, s_.c);
    for (std::int64_t c = 0; c < item_.channels; c += lanes()) {
      const V bias = hn::Load(d, s_.bias + c);
      const V skip = hn::Load(d, s_.skip + c);
      V largest = hn::Zero(d);
      for (std::int64_t at = c; at < span.length * s_.width; at += s_.width) {
        V dt = hn::Add(hn::Load(d, s_.dt + at), bias);
        if (p_.delta_softplus) dt = simd::softplus(d, dt);
        const V u = hn::Load(d, s_.du + at);
        hn::Store(dt, d, s_.dt + at);
        hn::Store(hn::Mul(dt, u), d, s_.du + at);
        hn::Store(hn::Mul(skip, u), d, s_.y + at);
        largest = larger(largest, hn::Abs(dt));
      }
      hn::Store(largest, d, s_.largest_dt + c);
    }
  }

  void advance(const Span& span) {
    const Tag d;
    const auto factor = [&](const Tensor& tensor, const float* variable, const float* constant,
                            std::int64_t channel) {
      return tensor.ndim() == 4 ? Factor{variable, p_.d_state, p_.d_state * s_.steps}
                                : Factor{constant + channel, 0, half_};
    };
    for (std::int64_t c = 0; c < item_.channels; c += lanes()) {
      prefetch_after(span, c / lanes(), (item_.channels + lanes() - 1) / lanes());
      const Lane lane = {span.length, s_.width, s_.dt + c, s_.du + c, s_.y + c};
      const V reach = hn::Mul(hn::Load(d, s_.largest_dt + c), hn::Load(d, s_.largest_a + c));
      const bool bounded = hn::AllTrue(d, hn::Le(reach, hn::Set(d, 126.0F)));
      walk_all(lane, p_.d_state, p_.complex, bounded, s_.A + c, s_.h + c,
               factor(p_.B, s_.b, s_.constant_b, c), factor(p_.C, s_.c, s_.constant_c, c));
    }
  }

  // y silu(z); dt is no longer needed, z takes its place.
  void gate(const Span& span) {
    const Tag d;
    stage_sequence(p_.z, span, s_.dt);
    for (std::int64_t step = 0; step < span.length; ++step) {
      for (std::int64_t c = 0; c < item_.channels; c += lanes()) {
        const std::int64_t at = step * s_.width + c;
        hn::Store(hn::Mul(hn::Load(d, s_.y + at), simd::silu(d, hn::Load(d, s_.dt + at))), d, s_.y + at);
      }
    }
  }

  void store_output(const Span& span) {
    const std::int64_t step = p_.reverse ? -p_.out.stride(2) : p_.out.stride(2);
    unstage(s_.y, s_.width, 0, p_.out, sequence_offset(p_.out, span.begin), step, p_.out.stride(1),
            span.length, item_.channels);
  }

  const Problem& p_;
  Scratch s_;
  std::int64_t half_;  // from the real to the imaginary half of A, h and constant factors
  Item item_;
  Row row_;
};

// Calls next(item) until it returns false.
void run_items(const Problem& problem, const Scratch& scratch, std::int64_t floats,
               bool (*next)(void*, Item&), void* state) {
  Worker worker(problem, scratch, floats);
  for (Item item; next(state, item);) worker.run(item);
}

}  // namespace
}  // namespace krait::scan::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace krait::scan {
namespace {
HWY_EXPORT(run_items);

// Hands out the blocks of channels of all rows, one by one.
struct Queue {
  const Problem& problem;
  std::int64_t block;
  std::atomic<std::int64_t> taken = 0;

  [[nodiscard]] std::int64_t blocks_per_group() const {
    return (problem.channels / problem.groups + block - 1) / block;
  }
  [[nodiscard]] std::int64_t count() const {
    return std::ssize(problem.rows) * problem.groups * blocks_per_group();
  }
  static bool next(void* self, Item& item) {
    auto& queue = *static_cast<Queue*>(self);
    const std::int64_t index = queue.taken.fetch_add(1, std::memory_order_relaxed);
    if (index >= queue.count()) return false;
    const std::int64_t blocks = queue.blocks_per_group();
    const std::int64_t channels = queue.problem.channels / queue.problem.groups;
    item.row = index / (queue.problem.groups * blocks);
    item.group = index / blocks % queue.problem.groups;
    const std::int64_t first = index % blocks * queue.block;
    item.first_channel = item.group * channels + first;
    item.channels = std::min(queue.block, channels - first);
    return true;
  }
};

}  // namespace

void run_simd(Context& ctx, const Problem& p) {
  std::int64_t tokens = 0;
  for (const Row& row : p.rows) tokens += row.length;
  // A state step takes a fifth of a nanosecond or so; below ten microseconds a second thread costs more.
  constexpr std::int64_t kSmall = 50'000;
  const bool small = tokens * p.channels * (p.d_state + 4) < kSmall;
  const int threads = small ? 1 : ctx.threads();

  Scratch scratch;
  const std::int64_t block =
      choose_channel_block(std::ssize(p.rows), p.groups, p.channels / p.groups, threads);
  scratch.width = (block + 15) / 16 * 16;
  scratch.steps = choose_steps(p.d_state, p.complex);
  scratch.d_state = p.d_state;
  const std::int64_t floats = scratch.place(nullptr);
  Queue queue{p, block};
  const std::int64_t workers = std::min<std::int64_t>(threads, queue.count());
  if (workers == 0) return;
  const Tensor memory = ctx.empty({workers, floats});
  parallel_for(ctx, workers, 1, [&](std::int64_t begin, std::int64_t) {
    Scratch own = scratch;
    own.place(memory.data<float>() + begin * floats);
    HWY_DYNAMIC_DISPATCH(run_items)(p, own, floats, &Queue::next, &queue);
  });
}

}  // namespace krait::scan
#endif  // HWY_ONCE
