#include "krait/train/settings.h"

#include <gtest/gtest.h>

#include <cmath>

#include "io/scratch.h"

namespace krait {
namespace {

// Every setting with a value that is not its default.
TrainSettings unusual() {
  TrainSettings s;
  s.model = "some \"model\"";
  s.config = "c.json";
  s.tokenizer = "gpt-neox";
  s.data = {"a b.txt", "c,d.bin"};
  s.val = {"v.txt"};
  s.out = "out";
  s.steps = 7;
  s.epochs = 1.5;
  s.batch_size = 3;
  s.seq_len = 33;
  s.accumulate = 4;
  s.ignore_boundaries = true;
  s.carry_state = true;
  s.dtype = DType::bf16;
  s.recompute = Recompute::block;
  s.dropout = 0.25;
  s.seed = 9007199254740993;  // more than a double holds
  s.lr = 0.1 + 0.2;
  s.schedule = Schedule::wsd;
  s.warmup = 11;
  s.decay = 12;
  s.min_lr = 1e-5;
  s.weight_decay = 0.01;
  s.no_decay = {"a{1,2}", "D"};
  s.betas = {0.8, 0.99};
  s.eps = 1e-6;
  s.clip = 0.5;
  s.ema = 0.999;
  s.save_every = 100;
  s.keep = 5;
  s.eval_every = 50;
  s.patience = 6;
  s.export_weights = Export::best;
  s.sample_every = 70;
  s.sample_prompt = "To be\n";
  s.sample_tokens = 30;
  s.log_every = 2;
  return s;
}

TEST(Settings, EveryOneIsWrittenAndReadBack) {
  TrainSettings back;
  const std::string json = settings_json(unusual());
  parse_settings_json(json, "s.json", back);
  EXPECT_EQ(settings_json(back), json);
  EXPECT_EQ(back.lr, 0.1 + 0.2);
  EXPECT_EQ(back.seed, 9007199254740993);
  EXPECT_EQ(back.no_decay, unusual().no_decay);
  // None of them has its default: the table reaches all of them.
  TrainSettings defaults;
  TrainSettings other = unusual();
  const auto a = settings_table(defaults);
  const auto b = settings_table(other);
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NE(value_text(a[i]), value_text(b[i])) << a[i].name;
}

TEST(Settings, TomlSaysTheSame) {
  TrainSettings settings;
  parse_settings_toml(R"(
# a run
config = "c.json"
data = ["a b.txt", "c,d.bin"]
val = "v.txt"
batch-size = 3       # dashes as on the command line
lr = 3e-4
weight_decay = 1     # an integer where a number is expected
schedule = "cosine"
dtype = "bf16"
no_decay = "A_log,D"
betas = [0.8, 0.99]
carry_state = true
sample_prompt = "\n"
)",
                      "s.toml", settings);
  EXPECT_EQ(settings.config, "c.json");
  EXPECT_EQ(settings.data, (std::vector<std::string>{"a b.txt", "c,d.bin"}));
  EXPECT_EQ(settings.val, std::vector<std::string>{"v.txt"});
  EXPECT_EQ(settings.batch_size, 3);
  EXPECT_EQ(settings.lr, 3e-4);
  EXPECT_EQ(settings.weight_decay, 1.0);
  EXPECT_EQ(settings.schedule, Schedule::cosine);
  EXPECT_EQ(settings.dtype, DType::bf16);
  EXPECT_EQ(settings.no_decay, (std::vector<std::string>{"A_log", "D"}));
  EXPECT_EQ(settings.betas, (std::vector<double>{0.8, 0.99}));
  EXPECT_TRUE(settings.carry_state);
  EXPECT_EQ(settings.sample_prompt, "\n");
  EXPECT_EQ(settings.seq_len, TrainSettings().seq_len);
}

TEST(Settings, FilesGoByTheirName) {
  const io::Scratch scratch;
  TrainSettings settings;
  read_settings(scratch.put("a.json", R"({"steps": 5})"), settings);
  EXPECT_EQ(settings.steps, 5);
  read_settings(scratch.put("a.toml", "steps = 6"), settings);
  EXPECT_EQ(settings.steps, 6);
  EXPECT_MESSAGE(read_settings(scratch.put("a.yaml", "steps: 7"), settings), "expected .json or .toml");
  EXPECT_MESSAGE(read_settings(scratch / "no.toml", settings), "no.toml");
}

std::string json_error(const std::string& text) {
  TrainSettings settings;
  const std::string before = settings_json(settings);
  std::string message = io::message_of([&] { parse_settings_json(text, "s.json", settings); });
  EXPECT_EQ(settings_json(settings), before) << "a refused file changed settings: " << text;
  return message;
}

TEST(Settings, RefusalsNameFileAndKey) {
  EXPECT_EQ(json_error(R"({"lr": 0.1, "learning_rate": 1})"), "s.json: unknown setting \"learning_rate\"");
  EXPECT_EQ(json_error(R"({"batch_size": 1, "batch-size": 2})"), "s.json: setting batch_size is given twice");
  EXPECT_EQ(json_error(R"({"accumulate": 0})"), "s.json: accumulate is 0, expected an integer of at least 1");
  EXPECT_EQ(json_error(R"({"batch_size": 2.5})"),
            "s.json: batch_size is 2.5, expected an integer of at least 0");
  EXPECT_EQ(json_error(R"({"steps": 18446744073709551615})"),
            "s.json: steps is 18446744073709551615, expected an integer of at least 0");
  EXPECT_EQ(json_error(R"({"lr": "fast"})"), "s.json: lr is 'fast', expected a number of at least 0");
  EXPECT_EQ(json_error(R"({"lr": -1})"), "s.json: lr is -1, expected a number of at least 0");
  EXPECT_EQ(json_error(R"({"dropout": 1})"), "s.json: dropout is 1, expected a number from 0 to 0.999");
  EXPECT_EQ(json_error(R"({"schedule": "sine"})"),
            "s.json: schedule is 'sine', expected constant|linear|cosine|wsd");
  EXPECT_EQ(json_error(R"({"dtype": "f16"})"), "s.json: dtype is 'f16', expected f32|bf16");
  EXPECT_EQ(json_error(R"({"data": 3})"), "s.json: data is 3, expected a list of texts");
  EXPECT_EQ(json_error(R"({"data": ["a", 3]})"), "s.json: data is [\"a\",3], expected a list of texts");
  EXPECT_EQ(json_error(R"({"betas": "0.9,x"})"), "s.json: betas is '0.9,x', expected a list of numbers");
  EXPECT_EQ(json_error(R"({"carry_state": 1})"), "s.json: carry_state is 1, expected true or false");
  EXPECT_EQ(json_error("[]"), "s.json: is array, expected an object of settings");
  EXPECT_NE(json_error("{").find("is not JSON"), std::string::npos);
  TrainSettings settings;
  EXPECT_MESSAGE(parse_settings_toml("lr = \n", "s.toml", settings), "s.toml:1:");
  EXPECT_MESSAGE(parse_settings_toml("lr = 1\nlr = 2", "s.toml", settings), "s.toml:2:");
  EXPECT_MESSAGE(parse_settings_toml("[optimizer]\nlr = 1", "s.toml", settings),
                 "unknown setting \"optimizer\"");
  EXPECT_MESSAGE(parse_settings_toml("lr = nan", "s.toml", settings),
                 "s.toml: lr is nan, expected a number of at least 0");
  EXPECT_MESSAGE(parse_settings_toml("eps = -inf", "s.toml", settings), "eps is -inf, expected a number");
  EXPECT_MESSAGE(parse_settings_toml("lr = 1979-05-27", "s.toml", settings), "lr is '1979-05-27'");
}

TEST(Settings, TheCommandLineGoesBeforeTheFile) {
  TrainSettings settings = unusual();
  TrainSettings line;
  line.lr = 5.0;
  line.epochs = 2.0;
  line.config = "new.json";
  line.no_decay = {};
  line.batch_size = 99;  // not named
  override_settings(settings, line, {"lr", "epochs", "config", "no_decay"});
  EXPECT_EQ(settings.lr, 5.0);
  EXPECT_EQ(settings.epochs, 2.0);
  EXPECT_EQ(settings.steps, 0) << "epochs did not take the place of steps";
  EXPECT_EQ(settings.config, "new.json");
  EXPECT_EQ(settings.model, "") << "config did not take the place of model";
  EXPECT_TRUE(settings.no_decay.empty());
  EXPECT_EQ(settings.batch_size, unusual().batch_size);
}

TEST(Settings, CheckedTogether) {
  const auto message = [](const auto& change) {
    TrainSettings s;
    s.config = "c.json";
    s.data = {"d.txt"};
    s.out = "out";
    change(s);
    return io::message_of([&] { check_settings(s); });
  };
  using S = TrainSettings;
  EXPECT_EQ(message([](S&) {}), "");
  EXPECT_EQ(message([](S& s) { s.config = ""; }), "neither model nor config is given, expected one of them");
  EXPECT_EQ(message([](S& s) { s.model = "m"; }), "model and config are both given, expected one of them");
  EXPECT_EQ(message([](S& s) { s.data = {}; }), "no data is given, expected one file or more");
  EXPECT_EQ(message([](S& s) { s.out = ""; }), "no out is given, expected the run's directory");
  EXPECT_EQ(message([](S& s) { s.steps = 1, s.epochs = 1; }),
            "steps and epochs are both given, expected one of them");
  EXPECT_EQ(message([](S& s) { s.steps = -1; }), "steps is -1, expected an integer of at least 0");
  EXPECT_EQ(message([](S& s) { s.betas = {0.9}; }), "betas has 1 numbers, expected 2");
  EXPECT_EQ(message([](S& s) { s.betas = {0.9, 1.0}; }), "betas has 1, expected at least 0 and less than 1");
  EXPECT_EQ(message([](S& s) { s.eps = 0.0; }), "eps is 0, expected more than 0");
  EXPECT_EQ(message([](S& s) { s.ema = 1.0; }), "ema is 1, expected less than 1");
  EXPECT_EQ(message([](S& s) { s.min_lr = 1.0; }), "min_lr is 1, expected at most lr = 0.001");
  EXPECT_EQ(message([](S& s) { s.lr = NAN; }), "lr is nan, expected a number of at least 0");
  EXPECT_EQ(message([](S& s) { s.export_weights = Export::average; }), "export is average, which needs ema");
  EXPECT_EQ(message([](S& s) { s.export_weights = Export::best; }), "export is best, which needs val");
  EXPECT_EQ(message([](S& s) { s.patience = 3; }), "patience is 3, which needs val");
  EXPECT_EQ(message([](S& s) {
              s.no_decay = {"D", "("};
            }),
            "no_decay has '(', expected a regular expression");
}

}  // namespace
}  // namespace krait
