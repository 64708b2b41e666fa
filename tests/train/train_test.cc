#include "krait/train/train.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "io/scratch.h"
#include "krait/eval/score.h"
#include "krait/io/npy.h"
#include "krait/io/safetensors.h"
#include "support/golden.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// A model for the vocabulary of the bundled Shakespeare model, small enough to train in a moment.
constexpr const char* kConfig = R"({"d_model": 16, "n_layer": 1, "vocab_size": 1024, "rms_norm": true,
  "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 16}, "tie_embeddings": true})";

std::string shakespeare() {
  static const std::string text =
      io::content_of(fs::path(KRAIT_SOURCE_DIR) / "tests/data/tinyshakespeare.txt");
  return text;
}

class TrainTest : public ::testing::Test {
 protected:
  TrainTest() {
    settings_.config = scratch_.put("config.json", kConfig).string();
    settings_.tokenizer = std::string(KRAIT_MODELS_DIR) + "/shakespeare";
    settings_.data = {scratch_.put("train.txt", shakespeare().substr(0, 20000)).string()};
    settings_.val = {scratch_.put("val.txt", shakespeare().substr(1100000, 1500)).string()};
    settings_.out = (scratch_ / "out").string();
    settings_.steps = 12;
    settings_.batch_size = 2;
    settings_.seq_len = 32;
    settings_.lr = 1e-2;
    settings_.eval_every = 4;
    settings_.save_every = 5;
    settings_.sample_every = 6;
    settings_.sample_tokens = 8;
  }

  [[nodiscard]] std::string message(const TrainSettings& settings, bool resume = false) {
    return io::message_of([&] { train(ctx_, settings, {.resume = resume}); });
  }
  [[nodiscard]] fs::path out(std::string_view name = "") const { return fs::path(settings_.out) / name; }

  // The lines of a file of the run.
  [[nodiscard]] static std::vector<json> lines_of(const fs::path& path) {
    std::ifstream file(path);
    std::vector<json> lines;
    for (std::string line; std::getline(file, line);) lines.push_back(json::parse(line));
    return lines;
  }

  io::Scratch scratch_;
  Context ctx_;
  TrainSettings settings_;
};

// Every file below a directory with its content; times, which no two runs share, are left out.
std::map<std::string, std::string> contents_of(const fs::path& directory) {
  std::map<std::string, std::string> contents;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (!entry.is_regular_file() || entry.path().filename().string().starts_with("events")) continue;
    const std::string name = fs::relative(entry.path(), directory).string();
    std::string content = io::content_of(entry.path());
    if (name == "metrics.jsonl" || name.ends_with("state.json")) {
      std::string timeless;
      std::istringstream lines(content);
      for (std::string line; std::getline(lines, line);) {
        const auto cut = [&](const std::string& key) {
          const std::size_t at = line.find("\"" + key + "\":");
          if (at != std::string::npos) line.erase(at, line.find_first_of(",}", at) - at);
        };
        cut("seconds");
        cut("tokens_per_second");
        timeless += line + "\n";
      }
      content = timeless;
    }
    contents[name] = content;
  }
  return contents;
}

void expect_same_run(const fs::path& a, const fs::path& b) {
  const auto first = contents_of(a);
  const auto second = contents_of(b);
  for (const auto& [name, content] : first) {
    if (name == "settings.json") continue;
    ASSERT_TRUE(second.contains(name)) << name;
    EXPECT_TRUE(second.at(name) == content)
        << name << (content.size() < 5000 ? "\n" + content + "\n" + second.at(name) : "");
  }
  EXPECT_EQ(first.size(), second.size());
}

TEST_F(TrainTest, LeavesAModelAndWhatItSaw) {
  std::vector<StepReport> steps;
  std::vector<EvaluationReport> evaluations;
  const TrainResult result =
      train(ctx_, settings_,
            {.on_step = [&](const StepReport& r) { steps.push_back(r); },
             .on_evaluation = [&](const EvaluationReport& r) { evaluations.push_back(r); }});
  EXPECT_EQ(result.end, RunEnd::finished);
  EXPECT_EQ(result.steps, 12);
  ASSERT_EQ(steps.size(), 12U);
  EXPECT_LT(steps.back().loss, steps.front().loss);

  // The model scores, in a program of its own, what the last evaluation said.
  ASSERT_EQ(evaluations.size(), 3U);
  const ModelFiles files = open_model_directory(out());
  const LanguageModel model = load_language_model(ctx_, files);
  const Score score =
      score_text(ctx_, model, load_tokenizer(files), io::content_of(settings_.val[0]), settings_.seq_len);
  EXPECT_EQ(evaluations.back().step, 12);
  EXPECT_DOUBLE_EQ(evaluations.back().loss, score.loss);
  ASSERT_TRUE(evaluations.back().bits_per_byte.has_value());
  EXPECT_DOUBLE_EQ(*evaluations.back().bits_per_byte, *score.bits_per_byte);

  const auto metrics = lines_of(out("metrics.jsonl"));
  ASSERT_EQ(metrics.size(), 15U);
  EXPECT_EQ(metrics[0]["step"], 1);
  EXPECT_EQ(metrics[0]["loss"].get<double>(), steps[0].loss);
  EXPECT_EQ(metrics[0]["grad_norm"].get<double>(), steps[0].grad_norm);
  EXPECT_EQ(metrics[0]["lr"], 1e-2);
  EXPECT_EQ(metrics[0]["tokens"], 64);
  EXPECT_EQ(metrics[0]["skipped"], 0);
  EXPECT_GT(metrics[0]["tokens_per_second"].get<double>(), 0.0);
  EXPECT_GT(metrics[1]["seconds"].get<double>(), metrics[0]["seconds"].get<double>());
  EXPECT_EQ(metrics[4]["step"], 4);
  EXPECT_EQ(metrics[4]["val_loss"].get<double>(), evaluations[0].loss);
  EXPECT_TRUE(metrics[4].contains("val_bits_per_byte"));
  EXPECT_EQ(metrics[14]["val_loss"].get<double>(), score.loss);
  const auto samples = lines_of(out("samples.jsonl"));
  ASSERT_EQ(samples.size(), 2U);
  EXPECT_EQ(samples[1]["step"], 12);
  EXPECT_TRUE(samples[1]["text"].get<std::string>().starts_with("\n"));

  TrainSettings written;
  read_settings(out("settings.json"), written);
  EXPECT_EQ(settings_json(written), settings_json(settings_));
  EXPECT_EQ(io::content_of(out("config.json")), kConfig);
  EXPECT_EQ(io::content_of(out("tokenizer.json")),
            io::content_of(fs::path(KRAIT_MODELS_DIR) / "shakespeare/tokenizer.json"));
  // Two checkpoints, of steps 10 and 12, which are models too.
  std::set<std::string> checkpoints;
  for (const auto& entry : fs::directory_iterator(out("checkpoints")))
    checkpoints.insert(entry.path().filename().string());
  EXPECT_EQ(checkpoints, (std::set<std::string>{"step-10", "step-12"}));
  (void)load_language_model(ctx_, open_model_directory(out("checkpoints/step-10")));
  EXPECT_FALSE(fs::exists(out(".lock")));
}

// A run with everything in it that has a state.
TrainSettings involved(TrainSettings settings) {
  settings.accumulate = 2;
  settings.dropout = 0.1;
  settings.ema = 0.9;
  settings.schedule = Schedule::wsd;
  settings.warmup = 2;
  settings.export_weights = Export::best;
  settings.carry_state = true;
  settings.save_every = 3;
  return settings;
}

TEST_F(TrainTest, StoppedAndResumedIsUninterrupted) {
  settings_ = involved(settings_);
  train(ctx_, settings_);
  const fs::path whole = out();
  for (const std::int64_t stop_at : {0, 1, 3, 4, 8}) {
    SCOPED_TRACE(stop_at);
    settings_.out = (scratch_ / ("stopped-" + std::to_string(stop_at))).string();
    std::int64_t done = 0;
    const TrainOptions stopping{.stop = [&] { return done >= stop_at; },
                                .on_step = [&](const StepReport& r) { done = r.step; }};
    const TrainResult stopped = train(ctx_, settings_, stopping);
    EXPECT_EQ(stopped.end, RunEnd::interrupted);
    EXPECT_EQ(stopped.steps, stop_at);
    EXPECT_FALSE(fs::exists(out("model.safetensors")));
    Context other({.threads = 3});
    EXPECT_EQ(train(other, settings_, {.resume = true}).end, RunEnd::finished);
    expect_same_run(whole, out());
  }
}

// A signal cancels a Context too, at any moment: what is half done of a step must not be lost with it.
TEST_F(TrainTest, ACancelledContextEndsNoStep) {
  settings_.val.clear();
  settings_.sample_every = 0;
  bool cancelled = false;
  std::int64_t done = 0;
  Context ctx({.threads = 2, .cancelled = [&] { return cancelled; }});
  const TrainResult stopped = train(ctx, settings_,
                                    {.stop = [&] { return done >= 3; },
                                     .on_start = [&](const RunStart&) { cancelled = true; },
                                     .on_step = [&](const StepReport& r) { done = r.step; }});
  EXPECT_EQ(stopped.end, RunEnd::interrupted);
  EXPECT_EQ(stopped.steps, 3);
  EXPECT_TRUE(fs::exists(out("checkpoints/step-3")));
}

// A request to stop in the midst of an evaluation: it is made when the run goes on.
TEST_F(TrainTest, StoppedWhileEvaluatingIsUninterruptedToo) {
  settings_ = involved(settings_);
  train(ctx_, settings_);
  const fs::path whole = out();
  settings_.out = (scratch_ / "stopped").string();
  bool stop = false;
  Context cancelled({.cancelled = [&] { return stop; }});
  const TrainResult stopped = train(cancelled, settings_,
                                    {.stop = [&] { return stop; },
                                     .on_step =
                                         [&](const StepReport& r) {
                                           stop = r.step == 8;  // which an evaluation follows
                                         }});
  EXPECT_EQ(stopped.end, RunEnd::interrupted);
  EXPECT_EQ(stopped.steps, 8);
  EXPECT_EQ(lines_of(out("metrics.jsonl")).back()["step"], 8);
  EXPECT_FALSE(lines_of(out("metrics.jsonl")).back().contains("val_loss"));
  EXPECT_EQ(train(ctx_, settings_, {.resume = true}).end, RunEnd::finished);
  expect_same_run(whole, out());
}

TEST_F(TrainTest, PathsInASettingsFileAreRelativeToTheCurrentDirectory) {
  struct Inside {
    fs::path before = fs::current_path();
    explicit Inside(const fs::path& directory) { fs::current_path(directory); }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;
    ~Inside() { fs::current_path(before); }
  };
  fs::create_directories(scratch_ / "deep/elsewhere");
  scratch_.put("deep/run.toml",
               "config = 'config.json'\ndata = ['train.txt']\nval = 'val.txt'\nout = 'run'\nsteps = 2\n"
               "tokenizer = '" +
                   settings_.tokenizer + "'\nseq_len = 32\nbatch_size = 2\n");
  const Inside inside(scratch_.path());
  TrainSettings settings;
  read_settings("deep/run.toml", settings);
  EXPECT_EQ(train(ctx_, settings).end, RunEnd::finished);
  EXPECT_TRUE(fs::exists(scratch_ / "run/model.safetensors"));
  // The run's own settings are no different: it goes on from the same place, and only from there.
  const std::string out = (scratch_ / "run").string();
  settings = *settings_of_run(out);
  settings.out = out;
  settings.steps = 3;
  {
    const Inside elsewhere(scratch_ / "deep/elsewhere");
    EXPECT_NE(message(settings, true).find("train.txt: cannot be opened"), std::string::npos);
  }
  EXPECT_EQ(message(settings, true), "");
}

// What a kill leaves: a run some steps after its last checkpoint, with half a line, half a file and half a
// checkpoint.
TEST_F(TrainTest, KilledAndResumedIsUninterrupted) {
  settings_ = involved(settings_);
  train(ctx_, settings_);
  const fs::path whole = out();
  for (const std::int64_t kill_at : {1, 5, 8, 9}) {
    SCOPED_TRACE(kill_at);
    settings_.out = (scratch_ / ("killed-" + std::to_string(kill_at))).string();
    struct Killed {};
    const TrainOptions dying{.on_step = [&](const StepReport& r) {
      if (r.step == kill_at) throw Killed();
    }};
    EXPECT_THROW(train(ctx_, settings_, dying), Killed);
    std::ofstream(out("metrics.jsonl"), std::ios::app) << "{\"step\":9,\"lo";
    std::ofstream(out(".krait-0123.tmp")) << "half";
    fs::create_directories(out("checkpoints/.step-9.tmp"));
    std::ofstream(out("checkpoints/.step-9.tmp/model.safetensors")) << "half";
    EXPECT_EQ(train(ctx_, settings_, {.resume = true}).end, RunEnd::finished);
    expect_same_run(whole, out());
  }
}

// The event file of a process that goes on begins with SessionLog START (field 7, in which status, field 1,
// is 1) at the step after the checkpoint (field 2).
TEST_F(TrainTest, TensorBoardIsToldWhereARunGoesOn) {
  struct Killed {};
  const TrainOptions dying{.on_step = [](const StepReport& r) {
    if (r.step == 8) throw Killed();
  }};
  EXPECT_THROW(train(ctx_, settings_, dying), Killed);
  train(ctx_, settings_, {.resume = true});
  const auto files_with_start_at = [&](char step) {
    const std::string start = std::string{0x10, step} + std::string("\x3a\x02\x08\x01");
    std::int64_t count = 0;
    for (const auto& entry : fs::directory_iterator(out("tensorboard")))
      count += io::content_of(entry.path()).find(start) != std::string::npos ? 1 : 0;
    return count;
  };
  EXPECT_EQ(files_with_start_at(1), 1);
  EXPECT_EQ(files_with_start_at(6), 1) << "the checkpoint is of step 5";
}

TEST_F(TrainTest, AFinishedRunStaysAsItIs) {
  train(ctx_, settings_, {.resume = true});  // from the beginning, since there is nothing to resume
  const auto stamps = [&] {
    std::map<std::string, fs::file_time_type> times;
    for (const auto& entry : fs::recursive_directory_iterator(out()))
      if (entry.is_regular_file()) times[entry.path().string()] = entry.last_write_time();
    return times;
  };
  const auto before = contents_of(out());
  const auto times = stamps();
  const TrainResult result = train(ctx_, settings_, {.resume = true});
  EXPECT_EQ(result.end, RunEnd::already_finished);
  EXPECT_EQ(result.steps, 12);
  EXPECT_EQ(contents_of(out()), before);
  EXPECT_EQ(stamps(), times);
  // More steps are more work.
  settings_.steps = 14;
  EXPECT_EQ(train(ctx_, settings_, {.resume = true}).end, RunEnd::finished);
  EXPECT_EQ(lines_of(out("metrics.jsonl")).back()["step"], 14);
}

TEST_F(TrainTest, ResumingWithOtherSettingsIsRefused) {
  std::int64_t done = 0;
  train(ctx_, settings_,
        {.stop = [&] { return done >= 2; }, .on_step = [&](const StepReport& r) { done = r.step; }});
  TrainSettings other = settings_;
  other.lr = 1.0;
  EXPECT_EQ(message(other, true), "lr is 1.0, but the run in " + settings_.out + " was started with 0.01");
  other = settings_;
  other.batch_size = 4;
  EXPECT_NE(message(other, true).find("batch_size is 4"), std::string::npos);
  scratch_.put("config.json", std::string(kConfig) + " ");
  EXPECT_NE(message(settings_, true).find("config.json: is not the configuration of"), std::string::npos);
  scratch_.put("config.json", kConfig);
  scratch_.put("train.txt", shakespeare().substr(0, 10000));
  EXPECT_NE(message(settings_, true).find("was made with data of"), std::string::npos);
  // Two words in another order, which are as many tokens.
  std::string text = shakespeare().substr(0, 20000);
  text.replace(text.find(" by the ", 10000), 8, " the by ");
  scratch_.put("train.txt", text);
  EXPECT_EQ(message(settings_, true), out("checkpoints/step-2").string() +
                                          ": was made with other data: " + settings_.data[0] +
                                          " has as many tokens as before, but not the same");
  scratch_.put("train.txt", shakespeare().substr(0, 20000));
  other = settings_;
  other.eval_every = 3;
  other.save_every = 7;
  other.log_every = 5;
  EXPECT_EQ(message(other, true), "");
}

TEST_F(TrainTest, ACheckpointOfAnotherShapeIsRefused) {
  std::int64_t done = 0;
  train(ctx_, settings_,
        {.stop = [&] { return done >= 2; }, .on_step = [&](const StepReport& r) { done = r.step; }});
  const fs::path weights = out("checkpoints/step-2/model.safetensors");
  io::TensorMap tensors = io::read_safetensors(weights);
  tensors["backbone.norm_f.weight"] = Tensor::zeros({17});
  io::write_safetensors(weights, tensors);
  const std::string text = message(settings_, true);
  EXPECT_NE(text.find("step-2: tensor backbone.norm_f.weight has shape (17,), expected (16,)"),
            std::string::npos)
      << text;
}

TEST_F(TrainTest, TheLastGoodCheckpointStays) {
  settings_.lr = 1e30;  // what follows the first step is not finite
  settings_.clip = 0.0;
  settings_.save_every = 1;
  settings_.keep = 1;
  settings_.val.clear();
  settings_.sample_every = 0;
  std::int64_t done = 0;
  train(ctx_, settings_,
        {.stop = [&] { return done >= 4; }, .on_step = [&](const StepReport& r) { done = r.step; }});
  EXPECT_TRUE(fs::exists(out("checkpoints/step-4")));
  EXPECT_TRUE(fs::exists(out("checkpoints/step-1")));
}

TEST_F(TrainTest, WeightsThatAreGoodForNothingAreNoModel) {
  settings_.clip = 0.0;
  settings_.sample_every = 0;
  const auto refused = [&](const std::string& expected) {
    const std::string text = message(settings_);
    EXPECT_NE(text.find(expected), std::string::npos) << text;
    EXPECT_FALSE(fs::exists(out("model.safetensors")));
    EXPECT_FALSE(fs::exists(out("checkpoints")));
    fs::remove_all(out());
  };
  settings_.steps = 1;
  settings_.lr = 1e39;  // infinite as f32
  refused("the weights after step 1 are not finite (backbone.");
  settings_.ema = 0.5;
  settings_.export_weights = Export::average;
  refused("the weights after step 1 are not finite (backbone.");
  settings_.export_weights = Export::best;
  refused("the weights after step 1 are not finite (backbone.");
  settings_.ema = 0.0;
  settings_.export_weights = Export::last;
  settings_.lr = 1e30;  // finite weights
  refused("the weights after step 1 give no finite loss: no model is written");
  settings_.steps = 5;  // four are skipped
  refused("the weights after step 1 give no finite loss: no model is written");
}

// What has become of the weights since does not matter.
TEST_F(TrainTest, TheBestIsAModelWhateverFollows) {
  settings_.ema = 0.9;
  settings_.export_weights = Export::best;
  std::int64_t done = 0;
  train(ctx_, settings_,
        {.stop = [&] { return done >= 4; }, .on_step = [&](const StepReport& r) { done = r.step; }});
  const fs::path file = out("checkpoints/step-4/optimizer.safetensors");
  io::TensorMap tensors = io::read_safetensors(file);
  Tensor average = tensors.at("average.backbone.norm_f.weight").clone();
  average.fill(INFINITY);
  tensors["average.backbone.norm_f.weight"] = average;
  io::write_safetensors(file, tensors);
  const std::string best = io::content_of(out("best-4.safetensors"));
  settings_.sample_every = 0;
  std::vector<std::string> warnings;
  Context ctx({.log = [&](LogLevel level, std::string_view text) {
    if (level == LogLevel::warning) warnings.emplace_back(text);
  }});
  EXPECT_EQ(train(ctx, settings_, {.resume = true}).best_step, 4);
  EXPECT_TRUE(io::content_of(out("model.safetensors")) == best);
  EXPECT_FALSE(fs::exists(out("average.safetensors")));
  EXPECT_EQ(warnings,
            (std::vector<std::string>{"average.safetensors is not written: averaged weights are not "
                                      "finite (backbone.norm_f.weight)"}));
}

// A batch may be at fault, and not the weights. The checkpoint is made to say that it was.
TEST_F(TrainTest, SkippedStepsAtTheEndAreReported) {
  settings_.sample_every = 0;
  std::int64_t done = 0;
  train(ctx_, settings_,
        {.stop = [&] { return done >= 11; }, .on_step = [&](const StepReport& r) { done = r.step; }});
  const fs::path file = out("checkpoints/step-11/state.json");
  json state = json::parse(io::content_of(file));
  state["updates"] = 9;
  state["skipped"] = 2;
  state["skipped_in_a_row"] = 2;
  std::ofstream(file) << state;
  std::vector<std::string> warnings;
  Context ctx({.log = [&](LogLevel level, std::string_view text) {
    if (level == LogLevel::warning) warnings.emplace_back(text);
  }});
  settings_.steps = 11;
  EXPECT_EQ(train(ctx, settings_, {.resume = true}).end, RunEnd::finished);
  ASSERT_EQ(warnings.size(), 1U);
  EXPECT_EQ(warnings[0], "the last 2 of 11 steps were skipped: the model is that of step 9");
  // Nothing was learnt at all.
  state["updates"] = 0;
  state["skipped"] = 11;
  state["skipped_in_a_row"] = 9;
  state["finished"] = false;
  std::ofstream(file) << state;
  fs::remove(out("model.safetensors"));
  EXPECT_EQ(message(settings_, true), "no step had a finite loss and gradient norm: no model is written");
  EXPECT_FALSE(fs::exists(out("model.safetensors")));
}

// Each row of a file of fixed batches is a block, whatever the length of the sequences that are trained on.
TEST_F(TrainTest, EvaluatesOnFixedBatches) {
  const fs::path path = scratch_ / "val.npy";
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < 3 * 2 * 9; ++i) ids.push_back(i * i % 1000);
  io::write_npy(path, Tensor::from(ids, {3, 2, 9}));
  settings_.val = {path.string()};
  EvaluationReport last;
  train(ctx_, settings_, {.on_evaluation = [&](const EvaluationReport& r) { last = r; }});
  const Score score =
      score_ids(ctx_, load_language_model(ctx_, open_model_directory(out())), Tensor::from(ids, {6, 9}));
  EXPECT_DOUBLE_EQ(last.loss, score.loss);
  EXPECT_FALSE(last.bits_per_byte.has_value());
}

TEST_F(TrainTest, StopsEarlyAndExportsTheBest) {
  settings_.steps = 200;
  settings_.lr = 0.5;  // which gets worse before long
  settings_.eval_every = 2;
  settings_.patience = 3;
  settings_.export_weights = Export::best;
  settings_.sample_every = 0;
  std::vector<double> losses;
  const TrainResult result =
      train(ctx_, settings_, {.on_evaluation = [&](const EvaluationReport& r) { losses.push_back(r.loss); }});
  EXPECT_EQ(result.end, RunEnd::stopped_early);
  EXPECT_EQ(result.steps, 2 * static_cast<std::int64_t>(losses.size()));
  const auto best = std::min_element(losses.begin(), losses.end());
  EXPECT_EQ(*best, result.best_loss);
  EXPECT_EQ(losses.end() - best, 4) << "three evaluations without a new best end the run";
  const ModelFiles files = open_model_directory(out());
  EXPECT_DOUBLE_EQ(score_text(ctx_, load_language_model(ctx_, files), load_tokenizer(files),
                              io::content_of(settings_.val[0]), settings_.seq_len)
                       .loss,
                   *best);
  EXPECT_EQ(train(ctx_, settings_, {.resume = true}).end, RunEnd::already_finished);
}

// Killed after a new best evaluation that the checkpoint does not know of, and that the resumed run, with
// other steps between evaluations, does not make again.
TEST_F(TrainTest, TheBestIsTheOneThatTheCheckpointKnows) {
  settings_.export_weights = Export::best;
  settings_.save_every = 4;
  settings_.keep = 0;
  settings_.sample_every = 0;
  struct Killed {};
  const TrainOptions dying{.on_evaluation = [](const EvaluationReport& r) {
    if (r.step == 8 && r.best) throw Killed();
  }};
  EXPECT_THROW(train(ctx_, settings_, dying), Killed);
  EXPECT_TRUE(fs::exists(out("best-4.safetensors")));
  EXPECT_TRUE(fs::exists(out("best-8.safetensors")));
  // As if the evaluation of step 4 had been so good that none of the later ones is better.
  const fs::path file = out("checkpoints/step-4/state.json");
  std::string state = io::content_of(file);
  const std::size_t begin = state.find("\"best_loss\": ") + 13;
  state.replace(begin, state.find(',', begin) - begin, "0.0");
  std::ofstream(file) << state;

  settings_.eval_every = 0;
  const TrainResult result = train(ctx_, settings_, {.resume = true});
  EXPECT_EQ(result.best_step, 4);
  EXPECT_TRUE(io::content_of(out("model.safetensors")) ==
              io::content_of(out("checkpoints/step-4/model.safetensors")));
  EXPECT_FALSE(fs::exists(out("best-8.safetensors")));
}

TEST_F(TrainTest, BestWeightsDoNotPileUp) {
  settings_.export_weights = Export::best;
  settings_.save_every = 5;
  settings_.eval_every = 1;
  settings_.sample_every = 0;
  train(ctx_, settings_, {.on_step = [&](const StepReport&) {
          std::int64_t count = 0;
          for (const auto& entry : fs::directory_iterator(out()))
            count += entry.path().filename().string().starts_with("best-") ? 1 : 0;
          EXPECT_LE(count, 2);
        }});
  // Without it there is nothing to go on with.
  settings_.steps = 14;
  for (const auto& entry : fs::directory_iterator(out()))
    if (entry.path().filename().string().starts_with("best-")) fs::remove(entry.path());
  EXPECT_NE(message(settings_, true).find("is missing, expected the weights of the best evaluation"),
            std::string::npos);
}

TEST_F(TrainTest, ExportsTheAverage) {
  settings_.ema = 0.9;
  settings_.export_weights = Export::average;
  EvaluationReport last;
  train(ctx_, settings_, {.on_evaluation = [&](const EvaluationReport& r) { last = r; }});
  EXPECT_EQ(io::content_of(out("model.safetensors")), io::content_of(out("average.safetensors")));
  const ModelFiles files = open_model_directory(out());
  const double loss = score_text(ctx_, load_language_model(ctx_, files), load_tokenizer(files),
                                 io::content_of(settings_.val[0]), settings_.seq_len)
                          .loss;
  EXPECT_DOUBLE_EQ(last.average_loss.value_or(0.0), loss);
  EXPECT_NE(last.loss, loss);
}

TEST_F(TrainTest, GoesOnFromACheckpointWithItsTokenizer) {
  train(ctx_, settings_);
  TrainSettings more = settings_;
  more.config = "";
  more.tokenizer = "";
  more.model = settings_.out;
  more.out = (scratch_ / "more").string();
  double first_loss = 0.0;
  train(ctx_, more,
        {.on_step = [&](const StepReport& r) { first_loss = r.step == 1 ? r.loss : first_loss; }});
  const auto lines = lines_of(out("metrics.jsonl"));
  EXPECT_LT(first_loss, lines[0]["loss"].get<double>() - 0.3) << "the weights were not kept";
  EXPECT_EQ(io::content_of(scratch_ / "more/tokenizer.json"), io::content_of(out("tokenizer.json")));
  more.tokenizer = "gpt-neox";
  more.out = (scratch_ / "again").string();
  EXPECT_NE(message(more).find("has one of its own"), std::string::npos);
}

TEST_F(TrainTest, RefusalsLeaveNothingBehind) {
  const auto refused = [&](const auto& change, const std::string& part) {
    TrainSettings settings = settings_;
    change(settings);
    EXPECT_MESSAGE(train(ctx_, settings, {}), part);
    EXPECT_FALSE(fs::exists(out())) << part;
  };
  using S = TrainSettings;
  const auto file = [&](std::string_view name, std::string_view content) {
    return scratch_.put(name, content).string();
  };
  refused([&](S& s) { s.data = {(scratch_ / "nowhere.txt").string()}; }, "nowhere.txt");
  refused([&](S& s) { s.data = {scratch_.path().string()}; }, scratch_.path().string());
  refused([&](S& s) { s.data = {file("empty.txt", "")}; }, "empty.txt");
  refused([&](S& s) { s.data = {file("short.txt", "Too short a text.")}; }, "short.txt");
  refused([&](S& s) { s.val = {(scratch_ / "noval.txt").string()}; }, "noval.txt");
  refused([&](S& s) { s.val = {file("short.txt", "Too short.")}; }, "expected at least seq_len = 32");
  refused([&](S& s) { s.val = {file("short.jsonl", "{\"text\": \"Too short.\"}")}; }, "short.jsonl: has");
  refused([&](S& s) { s.val = {file("binary.txt", std::string(1000, '\0'))}; }, "binary data");
  refused([&](S& s) { s.tokenizer = ""; }, "tokenizer");
  refused([&](S& s) { s.tokenizer = "gpt-neox"; }, "expected at most the model's vocab_size = 1024");
  refused([&](S& s) { s.tokenizer = file("t.json", "{}"); }, "t.json");
  refused([&](S& s) { s.config = (scratch_ / "none.json").string(); }, "none.json");
  refused([&](S& s) { s.config = file("bad.json", "{"); }, "bad.json");
  refused([&](S& s) { s.config = "", s.model = scratch_.path().string(); }, "");
  refused([&](S& s) { s.warmup = 13; }, "warmup is 13");
  refused([&](S& s) { s.sample_prompt = ""; }, "sample_prompt has no tokens");
  constexpr std::int64_t kHuge = std::int64_t{1} << 39;
  refused([&](S& s) { s.batch_size = kHuge; }, "batch_size is 549755813888: a step would need at least");
  refused([&](S& s) { s.seq_len = kHuge; }, "seq_len is 549755813888: a step would need at least");
  refused([&](S& s) { s.accumulate = kHuge; }, "accumulate is 549755813888: a step would need at least");
  refused([&](S& s) { s.batch_size = s.seq_len = kHuge; }, "seq_len is 549755813888: a step would need");
  const auto ids = scratch_ / "ids.npy";
  io::write_npy(ids, Tensor::from(std::vector<std::int64_t>(100, 5000)));
  refused([&](S& s) { s.data = {ids.string()}; }, "5000");
  EXPECT_MESSAGE(
      train(ctx_, settings_, {.on_step = [](const StepReport&) { fail(ErrorKind::io, "the disk is full"); }}),
      "the disk is full");
  EXPECT_TRUE(fs::exists(out("settings.json")));
  EXPECT_MESSAGE(train(ctx_, settings_, {}), "is not empty");
}

}  // namespace
}  // namespace krait
