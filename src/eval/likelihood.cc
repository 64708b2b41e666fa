#include "krait/eval/likelihood.h"

#include <algorithm>
#include <tuple>

#include "eval/prefix_tree.h"
#include "krait/core/error.h"
#include "krait/ops/cross_entropy.h"
#include "krait/ops/embedding.h"
#include "krait/ops/sampling.h"

namespace krait {
namespace {

// Fewer tokens in common than this are run again. Forking a state is some copies for each layer, which take
// as long as a token or two on a CPU, and as some tens on a GPU, where launching them is what takes long.
constexpr std::int64_t kLeastShared = 8;
constexpr std::int64_t kLeastSharedOfGpu = 64;
// Few-shot examples, a document, and what its choices have in common.
constexpr int kMaxDepth = 3;

// A token that continuations want the probability of, after the one at `position` of their sequence.
struct Target {
  std::int64_t position;
  std::int64_t id;
  std::size_t continuation;

  friend auto operator<=>(const Target&, const Target&) = default;
};

// Context and continuation of each, from the left as short as the model sees.
class Requests {
 public:
  Requests(std::span<const Continuation> continuations, std::int64_t max_length, std::int64_t vocab_size) {
    for (std::size_t i = 0; i < continuations.size(); ++i) {
      const auto& [context, continuation] = continuations[i];
      require(!context.empty(), "the context of continuation ", i, " has no tokens, expected at least 1");
      const std::int64_t length = std::ssize(continuation);
      require(length >= 1, "continuation ", i, " has no tokens, expected at least 1");
      require(max_length == 0 || length <= max_length, "continuation ", i, " has ", length,
              " tokens, expected at most max_length = ", max_length);
      for (const std::vector<std::int64_t>* ids : {&context, &continuation})
        for (const std::int64_t id : *ids)
          require(id >= 0 && id < vocab_size, "id ", id, " in continuation ", i,
                  ", expected 0 to vocab_size - 1 = ", vocab_size - 1);
      std::vector<std::int64_t> ids = context;
      ids.insert(ids.end(), continuation.begin(), continuation.end());
      // The last token is predicted and not an input.
      if (max_length > 0 && std::ssize(ids) > max_length + 1)
        ids.erase(ids.begin(), ids.end() - max_length - 1);
      first_.push_back(std::ssize(ids) - length - 1);
      ids_.push_back(std::move(ids));
    }
  }

  [[nodiscard]] std::span<const std::int64_t> input(std::size_t i) const {
    return std::span(ids_[i]).first(ids_[i].size() - 1);
  }
  [[nodiscard]] std::vector<std::span<const std::int64_t>> inputs() const {
    std::vector<std::span<const std::int64_t>> inputs;
    for (std::size_t i = 0; i < ids_.size(); ++i) inputs.push_back(input(i));
    return inputs;
  }
  // What is to be predicted after the tokens of a node, in order.
  [[nodiscard]] std::vector<Target> targets(const PrefixNode& node) const {
    std::vector<Target> targets;
    for (const std::int64_t member : node.members) {
      const auto i = static_cast<std::size_t>(member);
      for (std::int64_t t = std::max(node.begin, first_[i]); t < node.end; ++t)
        targets.push_back({.position = t, .id = ids_[i][static_cast<std::size_t>(t) + 1], .continuation = i});
    }
    std::ranges::sort(targets);
    return targets;
  }

 private:
  std::vector<std::vector<std::int64_t>> ids_;
  std::vector<std::int64_t> first_;  // place of the token that the first prediction follows
};

// Adds up what was asked for, from the hidden states behind it.
class Scorer {
 public:
  Scorer(Context& ctx, const LanguageModel& model, std::size_t count)
      : ctx_(ctx), model_(model), results_(count, {.log_likelihood = 0.0, .is_greedy = true}) {}

  void want(std::int64_t hidden_row, const Target& target) {
    // Targets come in order: continuations that want the same token after the same place are neighbours.
    if (rows_.empty() || rows_.back() != hidden_row || ids_.back() != target.id) {
      rows_.push_back(hidden_row);
      ids_.push_back(target.id);
    }
    wanted_.emplace_back(rows_.size() - 1, target.continuation);
  }

  void score(const Tensor& hidden) {
    const std::int64_t width = model_.config().padded_vocab_size();
    const std::int64_t block_bytes = std::int64_t{1} << (ctx_.on_gpu() ? 29 : 26);
    const std::int64_t block = std::max<std::int64_t>(1, block_bytes / (width * std::int64_t{sizeof(float)}));
    std::vector<float> losses;
    std::vector<std::int64_t> best;
    for (std::int64_t begin = 0; begin < std::ssize(rows_); begin += block) {
      const std::int64_t count = std::min(block, std::ssize(rows_) - begin);
      const auto part = [&](const std::vector<std::int64_t>& all) {
        return ctx_.to_device(Tensor::from(
            std::span(all).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)),
            {count}));
      };
      const Tensor logits = model_.head(
          ctx_, embedding(ctx_, {.ids = part(rows_), .weight = hidden, .out_dtype = hidden.dtype()}));
      const Tensor greedy = ctx_.empty({count}, DType::i64);
      sample_rows(ctx_,
                  {.logits = logits, .vocab_size = width, .options = {.temperature = 0.0}, .ids = greedy});
      const Tensor loss = ctx_.to_host(cross_entropy(ctx_, {.logits = logits, .targets = part(ids_)}).losses);
      const Tensor id = ctx_.to_host(greedy);
      losses.insert(losses.end(), loss.span<float>().begin(), loss.span<float>().end());
      best.insert(best.end(), id.span<std::int64_t>().begin(), id.span<std::int64_t>().end());
    }
    for (const auto& [row, continuation] : wanted_) {
      results_[continuation].log_likelihood -= losses[row];
      results_[continuation].is_greedy &= best[row] == ids_[row];
    }
    rows_.clear();
    ids_.clear();
    wanted_.clear();
  }

  [[nodiscard]] std::vector<Likelihood> take() { return std::move(results_); }

 private:
  Context& ctx_;
  const LanguageModel& model_;
  std::vector<Likelihood> results_;
  std::vector<std::int64_t> rows_;  // of hidden states, and the tokens wanted after them
  std::vector<std::int64_t> ids_;
  std::vector<std::pair<std::size_t, std::size_t>> wanted_;  // of these, and the continuations that want them
};

// Runs a tree from its top, a batch of nodes at a time, each on a fork of its parent's state.
class Walk {
 public:
  Walk(Context& ctx, const LanguageModel& model, const Requests& requests, std::vector<PrefixNode> nodes,
       std::int64_t batch_size, const LikelihoodOptions& options, Scorer& scorer, std::int64_t total)
      : ctx_(ctx),
        model_(model),
        requests_(requests),
        nodes_(std::move(nodes)),
        children_(nodes_.size()),
        batch_size_(static_cast<std::size_t>(batch_size)),
        options_(options),
        scorer_(scorer),
        total_(total),
        pool_(model.make_pool(std::min<std::int64_t>(batch_size, std::ssize(nodes_)))) {}

  void run() {
    std::vector<Place> top;
    for (std::size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].parent < 0)
        top.push_back({.node = i, .parent = nullptr});
      else
        children_[static_cast<std::size_t>(nodes_[i].parent)].push_back(i);
    }
    run(top);
  }

 private:
  struct Place {
    std::size_t node;
    const State* parent;
  };

  void run(std::span<const Place> places) {
    for (std::size_t begin = 0; begin < places.size(); begin += batch_size_) {
      const auto batch = places.subspan(begin, std::min(batch_size_, places.size() - begin));
      std::vector<State> states;
      std::vector<Place> below;
      states.reserve(batch.size());
      for (const Place& place : batch)
        states.push_back(place.parent == nullptr ? State(pool_) : place.parent->fork());
      run(batch, states);
      for (std::size_t i = 0; i < batch.size(); ++i)
        for (const std::size_t child : children_[batch[i].node])
          below.push_back({.node = child, .parent = &states[i]});
      run(below);
    }
  }

  void run(std::span<const Place> batch, std::vector<State>& states) {
    std::vector<Sequence> sequences;
    std::vector<std::vector<Target>> targets;
    for (std::size_t i = 0; i < batch.size(); ++i) {
      const PrefixNode& node = nodes_[batch[i].node];
      const auto ids = requests_.input(static_cast<std::size_t>(node.members.front()));
      sequences.push_back({.ids = ids.subspan(static_cast<std::size_t>(node.begin),
                                              static_cast<std::size_t>(node.end - node.begin)),
                           .state = &states[i]});
      targets.push_back(requests_.targets(node));
      done_ += std::ranges::count_if(node.members, [&](std::int64_t member) {
        return std::ssize(requests_.input(static_cast<std::size_t>(member))) == node.end;
      });
    }
    model_.for_each_pass(ctx_, sequences, [&](const LanguageModel::Pass& pass) {
      for (std::int64_t i = 0; i < pass.batch.size(); ++i) {
        const auto which = static_cast<std::size_t>(pass.sequence[static_cast<std::size_t>(i)]);
        const std::int64_t first = nodes_[batch[which].node].begin + pass.begins[static_cast<std::size_t>(i)];
        const std::int64_t last = first + pass.batch.end(i) - pass.batch.begin(i);
        auto target = std::ranges::lower_bound(targets[which], first, {}, &Target::position);
        for (; target != targets[which].end() && target->position < last; ++target)
          scorer_.want(pass.batch.begin(i) + target->position - first, *target);
      }
      scorer_.score(pass.hidden);
    });
    if (options_.progress) options_.progress(done_, total_);
  }

  Context& ctx_;
  const LanguageModel& model_;
  const Requests& requests_;
  std::vector<PrefixNode> nodes_;
  std::vector<std::vector<std::size_t>> children_;
  std::size_t batch_size_;
  const LikelihoodOptions& options_;
  Scorer& scorer_;
  std::int64_t total_;
  std::int64_t done_ = 0;
  std::shared_ptr<StatePool> pool_;
};

}  // namespace

std::int64_t choose_batch_size(std::size_t state_bytes) {
  constexpr std::size_t kBytes = std::size_t{2} << 30U;
  constexpr std::size_t kMost = 64;
  return static_cast<std::int64_t>(
      std::clamp<std::size_t>(kBytes / std::max<std::size_t>(state_bytes, 1), 1, kMost));
}

std::vector<Likelihood> likelihoods(Context& ctx, const LanguageModel& model,
                                    std::span<const Continuation> continuations,
                                    const LikelihoodOptions& options) {
  require(options.max_length >= 0, "max_length is ", options.max_length,
          ", expected at least 1, or 0 for any");
  require(options.batch_size >= 0, "batch_size is ", options.batch_size,
          ", expected at least 1, or 0 to have it chosen");
  const Requests requests(continuations, options.max_length, model.config().vocab_size);
  if (continuations.empty()) return {};
  const auto inputs = requests.inputs();
  std::int64_t batch_size = options.batch_size;
  if (batch_size == 0) {
    const auto longest =
        std::ranges::max(inputs, {}, [](std::span<const std::int64_t> ids) { return ids.size(); }).size();
    const auto pool = model.make_pool();
    batch_size = choose_batch_size(pool->fixed_bytes() + pool->bytes_per_token() * longest);
  }
  // Attention that looks ahead sees another beginning in each sequence.
  const ModelConfig& config = model.config();
  const bool causal = config.attn_layer_idx.empty() || config.attn.causal;
  const int depth = options.share_prefixes && causal ? kMaxDepth : 0;
  const std::int64_t least_shared = ctx.on_gpu() ? kLeastSharedOfGpu : kLeastShared;
  Scorer scorer(ctx, model, continuations.size());
  Walk(ctx, model, requests, prefix_tree(inputs, least_shared, depth), batch_size, options, scorer,
       std::ssize(continuations))
      .run();
  return scorer.take();
}

std::vector<Continuation> rolling_windows(std::span<const std::int64_t> ids, std::int64_t prefix,
                                          std::int64_t max_length) {
  require(max_length >= 1, "max_length is ", max_length, ", expected at least 1");
  const auto length = static_cast<std::size_t>(max_length);
  std::vector<Continuation> windows;
  for (std::size_t begin = 0; begin < ids.size();) {
    const std::size_t end = std::min(begin + length, ids.size());
    Continuation window;
    if (begin == 0) {
      window.context = {prefix};
    } else {
      // A full window ends where the text does, so that the last tokens are predicted from as many others.
      const auto context = ids.subspan(end - length - 1, begin - (end - length - 1));
      window.context.assign(context.begin(), context.end());
    }
    window.continuation.assign(ids.begin() + static_cast<std::ptrdiff_t>(begin),
                               ids.begin() + static_cast<std::ptrdiff_t>(end));
    windows.push_back(std::move(window));
    begin = end;
  }
  return windows;
}

}  // namespace krait
