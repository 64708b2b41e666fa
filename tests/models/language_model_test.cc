#include "krait/models/language_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

#include "krait/core/error.h"
#include "models/odd_configs.h"
#include "support/golden.h"

namespace krait {
namespace {

using testing::max_difference;
using testing::odd_configs;

std::vector<std::int64_t> some_ids(std::size_t count, std::uint64_t seed = 3) {
  Rng rng(seed);
  std::vector<std::int64_t> ids(count);
  for (auto& id : ids) id = rng.next_u32() % 50;
  return ids;
}

TEST(LanguageModel, EverySplitAndTheReferenceAgree) {
  for (const auto& [name, json] : odd_configs()) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model(parse_config(json, name));
    model.initialize(11);
    const auto ids = some_ids(61);
    State whole = model.new_state();
    const Tensor want = model.logits(ctx, ids, whole, LogitRows::all);
    ctx.set_reference(true);
    State slow = model.new_state();
    EXPECT_LT(max_difference(model.logits(ctx, ids, slow, LogitRows::all), want), 2e-4);
    ctx.set_reference(false);
    State state = model.new_state();
    std::size_t at = 0;
    for (const std::size_t n : {1U, 17U, 1U, 1U, 3U, 38U}) {
      const Tensor part = model.logits(ctx, std::span(ids).subspan(at, n), state, LogitRows::all);
      EXPECT_LT(max_difference(
                    part, want.slice(0, static_cast<std::int64_t>(at), static_cast<std::int64_t>(at + n))),
                2e-4);
      at += n;
    }
  }
}

TEST(LanguageModel, LongInputsRunInPassesThatAgreeWithOne) {
  Context ctx;
  LanguageModel model(parse_config(odd_configs().at("hybrid with mlp"), "config"));
  model.initialize(5);
  const auto ids = some_ids(1300);
  State state = model.new_state();
  const Tensor all = model.logits(ctx, ids, state, LogitRows::all);
  State piecewise = model.new_state();
  model.logits(ctx, std::span(ids).first(700), piecewise);
  const Tensor rest = model.logits(ctx, std::span(ids).subspan(700), piecewise);
  EXPECT_LT(max_difference(rest.select(0, 0), all.select(0, 1299)), 2e-4);
}

// More sequences than run at a time, some longer than a pass.
TEST(LanguageModel, ManySequencesWithoutStates) {
  Context ctx;
  LanguageModel model(parse_config(odd_configs().at("mamba2 d_ssm"), "config"));
  model.initialize(5);
  std::vector<std::vector<std::int64_t>> prompts;
  for (std::size_t i = 0; i < 40; ++i) prompts.push_back(some_ids(i == 17 ? 900 : 1 + 3 * i, i));
  std::vector<Sequence> sequences;
  for (const auto& p : prompts) sequences.push_back({.ids = p});
  const Tensor together = model.logits(ctx, sequences);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    State state = model.new_state();
    EXPECT_LT(max_difference(model.logits(ctx, prompts[i], state).select(0, 0),
                             together.select(0, static_cast<std::int64_t>(i))),
              2e-4)
        << i;
  }
}

TEST(LanguageModel, ForkRollbackAndSerialise) {
  for (const char* name : {"mamba1 odd sizes", "hybrid with mlp", "neox sequential"}) {
    SCOPED_TRACE(name);
    Context ctx;
    LanguageModel model(parse_config(odd_configs().at(name), name));
    model.initialize(2);
    const auto a = some_ids(20, 1);
    const auto b = some_ids(9, 2);
    State state = model.new_state();
    model.logits(ctx, a, state);
    const State snapshot = state.fork();
    std::ostringstream image;
    state.save(image);
    const Tensor first = model.logits(ctx, b, state, LogitRows::all);
    EXPECT_EQ(state.position(), 29);
    EXPECT_EQ(snapshot.position(), 20);
    model.logits(ctx, a, state);
    state.rollback(snapshot);
    EXPECT_EQ(max_difference(model.logits(ctx, b, state, LogitRows::all), first), 0.0);

    State loaded = model.new_state();
    std::istringstream in(image.str());
    loaded.load(in);
    EXPECT_EQ(loaded.position(), 20);
    EXPECT_EQ(max_difference(model.logits(ctx, b, loaded, LogitRows::all), first), 0.0);

    // Damaged, truncated and foreign images are refused and change nothing.
    State kept = snapshot.fork();
    const std::string bytes = image.str();
    for (const std::size_t cut :
         {std::size_t{0}, std::size_t{7}, std::size_t{20}, bytes.size() / 2, bytes.size() - 1}) {
      std::istringstream part(bytes.substr(0, cut));
      EXPECT_THROW(kept.load(part), Error) << cut;
    }
    for (const std::size_t at :
         {std::size_t{3}, std::size_t{9}, std::size_t{18}, bytes.size() / 2, bytes.size() - 1}) {
      std::string bad = bytes;
      bad[at] = static_cast<char>(bad[at] ^ 0x41);
      std::istringstream damaged(bad);
      EXPECT_THROW(kept.load(damaged), Error) << at;
    }
    LanguageModel other(parse_config(odd_configs().at("falcon"), "other"));
    other.initialize(2);
    State foreign = other.new_state();
    std::istringstream again(bytes);
    EXPECT_THROW(foreign.load(again), Error);
    EXPECT_EQ(max_difference(model.logits(ctx, b, kept, LogitRows::all), first), 0.0);
  }
}

// States of 16 bits: forks and images keep them as they are, and an image goes into a pool of another dtype.
TEST(LanguageModel, StatesOf16Bits) {
  for (const char* name : {"mamba1 odd sizes", "mamba2 groups, hdim D, no norm"}) {
    for (const DType dtype : {DType::bf16, DType::f16}) {
      SCOPED_TRACE(concat(name, " ", dtype));
      Context ctx;
      LanguageModel model(parse_config(odd_configs().at(name), name));
      model.initialize(2);
      const auto prompt = some_ids(20, 1);
      const auto rest = some_ids(9, 2);
      const auto pool = model.make_pool(1, dtype);
      EXPECT_EQ(pool->ssm(0).dtype(), dtype);
      EXPECT_LT(pool->fixed_bytes(), model.make_pool()->fixed_bytes());
      State exact = model.new_state();
      model.logits(ctx, prompt, exact);
      State state(pool);
      model.logits(ctx, prompt, state);  // rounds once, at its end
      State fork = state.fork();         // grows the pool
      std::ostringstream image;
      state.save(image);
      const auto go_on = [&](State& from) {
        std::vector<Tensor> steps;
        for (std::size_t t = 0; t < rest.size(); ++t)
          steps.push_back(model.logits(ctx, std::span(rest).subspan(t, 1), from));
        return steps;
      };
      const std::vector<Tensor> expected = go_on(exact);
      const std::vector<Tensor> found = go_on(state);
      const std::vector<Tensor> forked = go_on(fork);
      State loaded(pool);
      std::istringstream in(image.str());
      loaded.load(in);
      const std::vector<Tensor> continued = go_on(loaded);
      State wide = model.new_state();
      std::istringstream again(image.str());
      wide.load(again);
      EXPECT_EQ(wide.position(), 20);
      const std::vector<Tensor> widened = go_on(wide);
      double largest = 0.0;
      for (const float logit : expected[0].span<float>())
        largest = std::max(largest, std::abs(static_cast<double>(logit)));
      const double near = (dtype == DType::bf16 ? 0x1p-6 : 0x1p-9) * largest;
      for (std::size_t t = 0; t < rest.size(); ++t) {
        EXPECT_LT(max_difference(found[t], expected[t]), near) << t;
        EXPECT_GT(max_difference(found[t], expected[t]), 0.0) << t;
        EXPECT_LT(max_difference(widened[t], expected[t]), near) << t;
        EXPECT_EQ(max_difference(forked[t], found[t]), 0.0) << t;
        EXPECT_EQ(max_difference(continued[t], found[t]), 0.0) << t;
      }
    }
  }
  LanguageModel model(parse_config(odd_configs().at("falcon"), "falcon"));
  EXPECT_THROW(model.make_pool(1, DType::i32), Error);
}

TEST(LanguageModel, ForksGoTheirOwnWaysInOneBatch) {
  Context ctx;
  LanguageModel model(parse_config(odd_configs().at("hybrid with mlp"), "config"));
  model.initialize(2);
  State a = model.new_state();
  model.logits(ctx, some_ids(10), a);
  State b = a.fork();
  State c = a.fork();
  const std::vector<std::int64_t> one{1};
  const std::vector<std::int64_t> two{2};
  const Tensor alone = model.logits(ctx, two, c);
  const std::vector<Sequence> step{{.ids = one, .state = &a}, {.ids = two, .state = &b}};
  EXPECT_LT(max_difference(model.logits(ctx, step).select(0, 1), alone.select(0, 0)), 1e-5);
}

TEST(LanguageModel, BadInputChangesNothing) {
  Context ctx;
  LanguageModel model(parse_config(odd_configs().at("mamba1 odd sizes"), "config"));
  model.initialize(2);
  State state = model.new_state();
  const std::vector<std::int64_t> good = some_ids(5);
  model.logits(ctx, good, state);
  for (const std::int64_t id : {std::int64_t{-1}, std::int64_t{50}, std::int64_t{1} << 40}) {
    const std::vector<std::int64_t> bad{1, id};
    EXPECT_THROW(model.logits(ctx, bad, state), Error);
  }
  EXPECT_THROW(model.logits(ctx, std::span<const std::int64_t>(), state), Error);
  State elsewhere = model.new_state();
  const std::vector<Sequence> two_pools{{.ids = good, .state = &state}, {.ids = good, .state = &elsewhere}};
  EXPECT_THROW(model.logits(ctx, two_pools), Error);
  const std::vector<Sequence> shared{{.ids = good, .state = &state}, {.ids = good, .state = &state}};
  EXPECT_THROW(model.logits(ctx, shared), Error);
  EXPECT_EQ(state.position(), 5);
}

TEST(LanguageModel, InitialisationIsSeededAndAsDocumented) {
  LanguageModel a(parse_config(odd_configs().at("mamba1 odd sizes"), "config"));
  LanguageModel b(parse_config(odd_configs().at("mamba1 odd sizes"), "config"));
  a.initialize(1);
  b.initialize(1);
  std::map<std::string, Tensor> first;
  a.visit([&](const Parameter& p) { first[p.name] = p.tensor; });
  b.visit([&](const Parameter& p) { EXPECT_EQ(max_difference(first.at(p.name), p.tensor), 0.0) << p.name; });
  const auto bound = [&](const std::string& name) {
    double worst = 0;
    for (const float v : first.at(name).span<float>()) worst = std::max<double>(worst, std::abs(v));
    return worst;
  };
  const std::string mixer = "backbone.layers.0.mixer.";
  EXPECT_LE(bound(mixer + "in_proj.weight"), 1 / std::sqrt(37.0));
  EXPECT_GT(bound(mixer + "in_proj.weight"), 0.9 / std::sqrt(37.0));
  EXPECT_LE(bound(mixer + "out_proj.weight"), 1 / std::sqrt(111.0 * 2));
  EXPECT_GT(bound(mixer + "out_proj.weight"), 0.9 / std::sqrt(111.0 * 2));
  EXPECT_EQ(bound(mixer + "in_proj.bias"), 0.0);
  EXPECT_FLOAT_EQ(first.at(mixer + "A_log").data<float>()[4], std::log(5.0F));
  EXPECT_EQ(bound(mixer + "D"), 1.0);
  for (const float bias : first.at(mixer + "dt_proj.bias").span<float>()) {
    const double dt = std::log1p(std::exp(bias));
    EXPECT_GE(dt, 0.001 * 0.999);
    EXPECT_LE(dt, 0.1 * 1.001);
  }
}

TEST(Mamba2Simple, StartsFromItsLearntStates) {
  Context ctx;
  Mamba2Simple mixer({.d_model = 16, .d_state = 4, .headdim = 8, .learnable_init_states = true});
  Rng rng(4);
  mixer.initialize(rng);
  mixer.prepare(ctx);
  mixer.visit("m", [&](const Parameter& p) {
    if (p.name == "m.init_states")
      for (float& v : p.tensor.span<float>()) v = rng.normal();
  });
  const auto pool = StatePool::create({mixer.state_shape()}, 0);
  Tensor x = Tensor::empty({9, 16});
  for (float& v : x.span<float>()) v = rng.normal();
  const auto run = [&](std::span<const std::int64_t> lengths) {
    const State state(pool);
    Tensor out = Tensor::empty({9, 16});
    std::int64_t at = 0;
    for (const std::int64_t n : lengths) {
      const Batch batch(pool, {state.row()}, std::span(&n, 1));
      out.slice(0, at, at + n).copy_from(mixer.forward(ctx, x.slice(0, at, at + n), batch, 0));
      batch.advance();
      at += n;
    }
    return out;
  };
  const std::vector<std::int64_t> whole{9};
  const std::vector<std::int64_t> parts{1, 1, 5, 2};
  EXPECT_LT(max_difference(run(whole), run(parts)), 1e-5);
  // And they matter: from zeros the first output differs.
  const Tensor with = run(whole);
  mixer.visit("m", [&](const Parameter& p) {
    if (p.name == "m.init_states") p.tensor.fill(0.0);
  });
  EXPECT_GT(max_difference(run(whole), with), 1e-4);
}

}  // namespace
}  // namespace krait
