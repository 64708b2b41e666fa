#include "krait/train/settings.h"

#include <algorithm>
#include <cmath>
#include <regex>
#include <utility>

#include "krait/core/error.h"

namespace krait {
namespace {

constexpr std::int64_t kMaxCount = std::int64_t{1} << 40;
constexpr double kLargest = std::numeric_limits<double>::max();

template <typename E>
Setting::Choice choice_of(E& value, std::vector<std::pair<std::string, E>> names) {
  Setting::Choice choice;
  for (const auto& [name, unused] : names) choice.names.push_back(name);
  choice.get = [&value, names] {
    for (const auto& [name, one] : names)
      if (one == value) return name;
    return std::string();
  };
  choice.set = [&value, names](std::string_view text) {
    for (const auto& [name, one] : names)
      if (name == text) value = one;
  };
  return choice;
}

Setting::Integer count(std::int64_t& value, std::int64_t low = 0) { return {&value, low, kMaxCount}; }

// What excludes what: giving one undoes the other.
constexpr std::pair<const char*, const char*> kExclusive[] = {{"steps", "epochs"}, {"model", "config"}};

}  // namespace

std::string Setting::Integer::expected() const { return concat("an integer of at least ", low); }

std::string Setting::Number::expected() const {
  return high == kLargest ? concat("a number of at least ", low)
                          : concat("a number from ", low, " to ", high);
}

std::vector<Setting> settings_table(TrainSettings& s) {
  constexpr bool kFixed = true;
  std::vector<Setting> table{
      {"model", "MODEL", "Train this checkpoint on: directory, or name on the hub (org/name[@revision])",
       &s.model, kFixed},
      {"config", "FILE", "Train a model with fresh weights of this config.json", &s.config, kFixed},
      {"tokenizer", "T",
       "With --config: a tokenizer.json, a directory that holds one, or gpt-neox; not needed for token ids",
       &s.tokenizer, kFixed},
      {"data", "FILE", "What to train on: text, JSONL with \"text\", packed tokens, or .npy of token ids",
       &s.data, kFixed},
      {"val", "FILE", "What to evaluate on: the same kinds of files", &s.val, kFixed},
      {"out", "DIR", "The run's directory, new or empty unless --resume", &s.out},

      {"steps", "N", "Steps of the whole run", count(s.steps)},
      {"epochs", "X", "Passes over the data instead of --steps; 1 with neither",
       Setting::Number{&s.epochs, 0.0, 1e9}},
      {"batch_size", "N", "Sequences in a batch; 0 is 8, or what a file of fixed batches has",
       count(s.batch_size), kFixed},
      {"seq_len", "N", "Tokens of a sequence; 0 is 512, or what a file of fixed batches has",
       count(s.seq_len), kFixed},
      {"accumulate", "N", "Batches whose gradients make one step", count(s.accumulate, 1), kFixed},
      {"ignore_boundaries", "", "Let states pass from one document to the next", &s.ignore_boundaries,
       kFixed},
      {"carry_state", "",
       "Let states pass from one batch to the next, which goes on where it ended (truncated "
       "back-propagation through time)",
       &s.carry_state, kFixed},

      {"dtype", "", "Type of the matrices in computation; optimizer and master weights are f32",
       choice_of<DType>(s.dtype, {{"f32", DType::f32}, {"bf16", DType::bf16}}), kFixed},
      {"recompute", "", "block: keep only the input of each block, and compute the rest twice",
       choice_of<Recompute>(s.recompute, {{"none", Recompute::none}, {"block", Recompute::block}})},
      {"dropout", "X", "Dropout on the embedding and on what each block adds",
       Setting::Number{&s.dropout, 0.0, 0.999}, kFixed},
      {"seed", "N", "Of fresh weights, order of the data, dropout and samples",
       Setting::Integer{&s.seed, 0, std::numeric_limits<std::int64_t>::max()}, kFixed},

      {"lr", "X", "Learning rate", Setting::Number{&s.lr, 0.0, kLargest}, kFixed},
      {"schedule", "", "How it falls after the warmup; wsd stays and falls at the end",
       choice_of<Schedule>(s.schedule, {{"constant", Schedule::constant},
                                        {"linear", Schedule::linear},
                                        {"cosine", Schedule::cosine},
                                        {"wsd", Schedule::wsd}}),
       kFixed},
      {"warmup", "N", "Steps in which it rises", count(s.warmup), kFixed},
      {"decay", "N", "With wsd: steps in which it falls; 0 is a fifth of all", count(s.decay), kFixed},
      {"min_lr", "X", "What it falls to", Setting::Number{&s.min_lr, 0.0, kLargest}, kFixed},
      {"weight_decay", "X", "Weight decay (AdamW)", Setting::Number{&s.weight_decay, 0.0, kLargest}, kFixed},
      {"no_decay", "PATTERN,...",
       "Regular expressions; parameters with one of them in their name have no weight decay", &s.no_decay,
       kFixed, /*commas=*/true},
      {"betas", "A,B", "Of AdamW's averages of gradients and of their squares", &s.betas, kFixed,
       /*commas=*/true},
      {"eps", "X", "Of AdamW", Setting::Number{&s.eps, 0.0, kLargest}, kFixed},
      {"clip", "X", "Largest norm of all gradients together; 0 is off",
       Setting::Number{&s.clip, 0.0, kLargest}, kFixed},
      {"ema", "X", "Keep a moving average of the weights with this decay; 0 is off",
       Setting::Number{&s.ema, 0.0, 1.0}, kFixed},

      {"save_every", "N", "Steps between checkpoints; 0 is only at the end", count(s.save_every)},
      {"keep", "N", "Checkpoints to keep, the newest; 0 is all", count(s.keep)},
      {"eval_every", "N", "Steps between evaluations on --val; 0 is only at the end", count(s.eval_every)},
      {"patience", "N", "Stop after so many evaluations in a row that are not the best yet; 0 is never",
       count(s.patience)},
      {"export", "", "Which weights the run leaves: the last, their average (--ema), or the best evaluated",
       choice_of<Export>(s.export_weights,
                         {{"last", Export::last}, {"average", Export::average}, {"best", Export::best}}),
       kFixed},
      {"sample_every", "N", "Steps between samples of text; 0 is none", count(s.sample_every)},
      {"sample_prompt", "TEXT", "What samples continue", &s.sample_prompt},
      {"sample_tokens", "N", "Tokens of a sample", count(s.sample_tokens, 1)},
      {"log_every", "N", "Steps between lines of metrics.jsonl", count(s.log_every, 1)},
  };
  return table;
}

void override_settings(TrainSettings& settings, TrainSettings given, const std::vector<std::string>& names) {
  TrainSettings defaults;
  const std::vector<Setting> to = settings_table(settings);
  const std::vector<Setting> from = settings_table(given);
  const std::vector<Setting> fresh = settings_table(defaults);
  const auto copy = [&](const std::vector<Setting>& source, const std::string& name) {
    for (std::size_t i = 0; i < to.size(); ++i) {
      if (to[i].name != name) continue;
      std::visit(
          [&](const auto& place) {
            using Place = std::decay_t<decltype(place)>;
            const auto& other = std::get<Place>(source[i].place);
            if constexpr (std::is_same_v<Place, Setting::Choice>)
              place.set(other.get());
            else if constexpr (std::is_same_v<Place, Setting::Integer> ||
                               std::is_same_v<Place, Setting::Number>)
              *place.value = *other.value;
            else
              *place = *other;
          },
          to[i].place);
    }
  };
  for (const std::string& name : names) copy(from, name);
  const auto named = [&](const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  for (const auto& [one, other] : kExclusive) {
    if (named(one) && !named(other)) copy(fresh, other);
    if (named(other) && !named(one)) copy(fresh, one);
  }
}

void check_settings(const TrainSettings& settings) {
  TrainSettings copy = settings;
  for (const Setting& setting : settings_table(copy)) {
    if (const auto* integer = std::get_if<Setting::Integer>(&setting.place))
      require(integer->allows(*integer->value), setting.name, " is ", *integer->value, ", expected ",
              integer->expected());
    if (const auto* number = std::get_if<Setting::Number>(&setting.place))
      require(number->allows(*number->value), setting.name, " is ", *number->value, ", expected ",
              number->expected());
    if (const auto* choice = std::get_if<Setting::Choice>(&setting.place))
      require(!choice->get().empty(), setting.name, " is none of its choices");
  }
  require(settings.model.empty() != settings.config.empty(),
          settings.model.empty() ? "neither model nor config is given" : "model and config are both given",
          ", expected one of them");
  require(!settings.data.empty(), "no data is given, expected one file or more");
  require(!settings.out.empty(), "no out is given, expected the run's directory");
  require(settings.steps == 0 || settings.epochs == 0.0,
          "steps and epochs are both given, expected one of them");
  require(settings.seq_len != 1, "seq_len is 1, expected at least 2");
  require(settings.betas.size() == 2, "betas has ", settings.betas.size(), " numbers, expected 2");
  for (const double beta : settings.betas)
    require(beta >= 0.0 && beta < 1.0, "betas has ", beta, ", expected at least 0 and less than 1");
  // A gradient that was always 0, as of a token that never comes, divides by eps alone.
  require(static_cast<float>(settings.eps) > 0.0F, "eps is ", settings.eps, ", expected more than 0");
  require(settings.ema < 1.0, "ema is ", settings.ema, ", expected less than 1");
  require(settings.min_lr <= settings.lr, "min_lr is ", settings.min_lr,
          ", expected at most lr = ", settings.lr);
  require(settings.export_weights != Export::average || settings.ema > 0.0,
          "export is average, which needs ema");
  require(settings.export_weights != Export::best || !settings.val.empty(),
          "export is best, which needs val");
  require(settings.patience == 0 || !settings.val.empty(), "patience is ", settings.patience,
          ", which needs val");
  for (const std::string& pattern : settings.no_decay) {
    try {
      const std::regex check(pattern);
    } catch (const std::regex_error&) {
      fail(ErrorKind::invalid_argument, "no_decay has '", pattern, "', expected a regular expression");
    }
  }
}

}  // namespace krait
