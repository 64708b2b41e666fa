// TrainSettings: everything that says what a training run does. The same settings are the options of
// `krait train` (batch_size is --batch-size), the keys of a settings file (JSON or TOML), and what a run
// writes into its directory.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "krait/core/dtype.h"
#include "krait/modules/tape.h"
#include "krait/train/schedule.h"

namespace krait {

// Which weights a run leaves as its model.
enum class Export : std::uint8_t {
  last,     // those of the last step
  average,  // their moving average (with ema)
  best,     // those of the best evaluation (with val): early stopping
};

struct TrainSettings {
  // Model and data.
  std::string model;              // a checkpoint to go on from: directory, file or name on the hub
  std::string config;             // or a config.json, for a model with fresh weights
  std::string tokenizer;          // tokenizer.json, directory with one, or "gpt-neox"; empty: the model's
  std::vector<std::string> data;  // files to train on (dataset.h says of which kinds)
  std::vector<std::string> val;   // files to evaluate on
  std::string out;                // the run's directory

  // Steps. With neither steps nor epochs: one epoch.
  std::int64_t steps = 0;
  double epochs = 0.0;
  std::int64_t batch_size = 0;     // 0: 8, or what a file of fixed batches has
  std::int64_t seq_len = 0;        // 0: 512, or likewise
  std::int64_t accumulate = 1;     // batches whose gradients make one step
  bool ignore_boundaries = false;  // states pass from one document to the next
  bool carry_state = false;        // states pass from one batch to the next (truncated back-propagation)

  // Computation.
  DType dtype = DType::f32;  // of matrices in forward and backward: f32 or bf16; master weights are f32
  Recompute recompute = Recompute::none;
  double dropout = 0.0;
  std::int64_t seed = 0;  // of fresh weights, order of the data, dropout and samples

  // Optimizer.
  double lr = 1e-3;
  Schedule schedule = Schedule::constant;
  std::int64_t warmup = 0;
  std::int64_t decay = 0;  // of wsd; 0: a fifth of the steps
  double min_lr = 0.0;
  double weight_decay = 0.1;
  // Regular expressions (ECMAScript); a parameter in whose name one of them is found has no weight decay.
  std::vector<std::string> no_decay{"A_log$", "\\.D$", "bias$", "norm", "init_states$"};
  std::vector<double> betas{0.9, 0.95};
  double eps = 1e-8;
  double clip = 1.0;  // largest norm of all gradients together; 0: none
  double ema = 0.0;   // decay of the moving average of the weights; 0: none

  // What is kept, and what is looked at on the way. Every so many steps; 0: never.
  std::int64_t save_every = 1000;
  std::int64_t keep = 2;  // newest checkpoints; 0: all
  std::int64_t eval_every = 500;
  std::int64_t patience = 0;  // stop after so many evaluations without a new best; 0: never
  Export export_weights = Export::last;
  std::int64_t sample_every = 0;
  std::string sample_prompt = "\n";
  std::int64_t sample_tokens = 200;
  std::int64_t log_every = 1;
};

// One member of a TrainSettings by its name, for options and files alike.
struct Setting {
  struct Integer {
    std::int64_t* value;
    std::int64_t low;
    std::int64_t high;
    [[nodiscard]] bool allows(std::int64_t found) const { return found >= low && found <= high; }
    [[nodiscard]] std::string expected() const;  // "an integer of at least 1"
  };
  struct Number {
    double* value;
    double low;
    double high;
    [[nodiscard]] bool allows(double found) const { return found >= low && found <= high; }
    [[nodiscard]] std::string expected() const;  // "a number from 0 to 1"
  };
  struct Choice {
    std::vector<std::string> names;
    std::function<std::string()> get;
    std::function<void(std::string_view)> set;  // one of names
  };
  using Place = std::variant<bool*, Integer, Number, Choice, std::string*, std::vector<std::string>*,
                             std::vector<double>*>;

  std::string name;         // "batch_size"
  std::string type;         // "N", "FILE"; empty for a flag and where the place has choices
  std::string description;  // for --help
  Place place;
  bool fixed = false;   // a resumed run must have the value that it was started with
  bool commas = false;  // a list whose option is one text, with commas between its items
};

// The members of `settings`, which must outlive the result.
[[nodiscard]] std::vector<Setting> settings_table(TrainSettings& settings);

// Sets one setting from text, as on a command line. Throws where it is no such value.
void set_from_text(const Setting& setting, std::string_view text);

// Its value as JSON.
[[nodiscard]] std::string value_text(const Setting& setting);

// Reads a file whose name ends in .json or .toml and sets what it holds; the rest stays. Keys may be spelled
// with dashes. Lists may be one text, as on the command line. Throws Error naming file and key where a key is
// unknown, given twice, or its value has another type or range than expected. Paths are taken as they stand:
// relative ones are relative to the current directory, not to the file.
void read_settings(const std::filesystem::path& path, TrainSettings& settings);
void parse_settings_json(std::string_view json, const std::string& name, TrainSettings& settings);
void parse_settings_toml(std::string_view toml, const std::string& name, TrainSettings& settings);
// All settings as a JSON object, one a line.
[[nodiscard]] std::string settings_json(const TrainSettings& settings);

// Copies to `settings` those members of `given` that `names` names. What excludes a named member (steps and
// epochs, model and config) is set back to its default.
void override_settings(TrainSettings& settings, TrainSettings given, const std::vector<std::string>& names);

// Throws where settings are out of range or do not go together: one line that names them.
void check_settings(const TrainSettings& settings);

}  // namespace krait
