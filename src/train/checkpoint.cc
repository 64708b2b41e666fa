#include "train/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <utility>

#include "io/json.h"
#include "io/system_error.h"
#include "krait/io/atomic_file.h"
#include "krait/io/mapped_file.h"
#include "krait/io/safetensors.h"

namespace krait {
namespace fs = std::filesystem;
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kPrefix = "step-";
constexpr std::string_view kHidden = ".step-";
constexpr std::string_view kReplaced = ".replaced";
constexpr int kFormat = 2;

// Every member by its name, for writing and reading alike.
template <typename State, typename Visit>
void visit_members(State& s, const Visit& visit) {
  visit("step", s.trainer.step);
  visit("updates", s.trainer.updates);
  visit("batches", s.trainer.batches);
  visit("tokens", s.trainer.tokens);
  visit("skipped", s.trainer.skipped);
  visit("skipped_in_a_row", s.trainer.skipped_in_a_row);
  visit("seconds", s.trainer.seconds);
  visit("evaluated", s.evaluated);
  visit("sampled", s.sampled);
  visit("best_loss", s.best_loss);
  visit("best_step", s.best_step);
  visit("evaluations_since_best", s.evaluations_since_best);
  visit("finished", s.finished);
  visit("seed", s.trainer.seed);
  visit("data_tokens", s.trainer.data_tokens);
  visit("data_checksum", s.trainer.data_checksum);
}

std::string to_json(const RunState& state) {
  Json json{{"format", kFormat}};
  visit_members(state, [&](const char* name, const auto& value) { json[name] = value; });
  return json.dump(2) + "\n";
}

RunState read_state(const fs::path& path) {
  const nlohmann::json json = io::parse_json(io::read_file(path), 3, path.string() + ": the file");
  require(json.is_object() && json.value("format", 0) == kFormat, path.string(),
          ": is no state of a training run that this version understands");
  RunState state;
  visit_members(state, [&](const char* name, auto& value) {
    const auto found = json.find(name);
    using Value = std::decay_t<decltype(value)>;
    const bool fits = found != json.end() && (std::is_same_v<Value, bool>     ? found->is_boolean()
                                              : std::is_same_v<Value, double> ? found->is_number()
                                                                              : found->is_number_integer());
    require(fits, path.string(), ": ", name, " is missing or of another type than expected");
    value = found->get<Value>();
  });
  return state;
}

std::optional<std::int64_t> step_of(const fs::path& path) {
  const std::string name = path.filename().string();
  if (!name.starts_with(kPrefix)) return std::nullopt;
  std::int64_t step = 0;
  const char* end = name.data() + name.size();
  const auto [at, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  if (error != std::errc() || at != end || step < 0) return std::nullopt;
  return step;
}

// A new name is on disk once its directory is. Some file systems cannot flush one; nothing is lost then but
// the guarantee against a power failure.
void flush_directory(const fs::path& path) {
  const int directory = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return;
  ::fsync(directory);
  ::close(directory);
}

void put_in_place(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error) io::fail_errno(error.value(), to, "cannot be put in place");
}

}  // namespace

CheckpointStore::CheckpointStore(fs::path path) : path_(std::move(path)) {
  if (!fs::exists(path_)) return;
  std::vector<fs::path> hidden;
  for (const auto& entry : fs::directory_iterator(path_))
    if (entry.path().filename().string().starts_with(kHidden)) hidden.push_back(entry.path());
  for (const fs::path& left : hidden) {
    // One that was about to be replaced when the process was killed is still the newest.
    const fs::path name = path_ / left.stem().string().substr(1);
    if (left.extension() == kReplaced && !fs::exists(name))
      put_in_place(left, name);
    else
      fs::remove_all(left);
  }
}

std::vector<std::int64_t> CheckpointStore::steps() const {
  std::vector<std::int64_t> steps;
  if (!fs::exists(path_)) return steps;
  for (const auto& entry : fs::directory_iterator(path_))
    if (const auto step = step_of(entry.path())) steps.push_back(*step);
  std::sort(steps.begin(), steps.end());
  return steps;
}

fs::path CheckpointStore::path_of(std::int64_t step) const { return path_ / concat(kPrefix, step); }

void CheckpointStore::save(const Checkpoint& checkpoint, const CheckpointTexts& texts,
                           std::int64_t keep) const {
  const fs::path target = path_of(checkpoint.state.trainer.step);
  const fs::path hidden = path_ / concat(kHidden, checkpoint.state.trainer.step, ".tmp");
  std::error_code error;
  fs::create_directories(hidden, error);
  if (error) io::fail_errno(error.value(), hidden, "cannot be created");
  try {
    io::write_safetensors(hidden / "model.safetensors", checkpoint.tensors.model, {{"format", "pt"}});
    io::write_safetensors(hidden / "optimizer.safetensors", checkpoint.tensors.optimizer);
    write_texts(hidden, texts);
    io::write_file(hidden / "state.json", to_json(checkpoint.state));
  } catch (...) {
    fs::remove_all(hidden, error);
    throw;
  }
  // One of the same step was written before the step was evaluated.
  const fs::path replaced = path_ / concat(kHidden, checkpoint.state.trainer.step, kReplaced);
  const bool replaces = fs::exists(target);
  if (replaces) put_in_place(target, replaced);
  put_in_place(hidden, target);
  flush_directory(path_);
  if (replaces) fs::remove_all(replaced);
  if (keep == 0) return;
  const std::vector<std::int64_t> all = steps();
  for (std::size_t i = 0; i + static_cast<std::size_t>(keep) < all.size(); ++i) remove(all[i]);
}

std::optional<Checkpoint> CheckpointStore::load_newest() const {
  const std::vector<std::int64_t> all = steps();
  if (all.empty()) return std::nullopt;
  const fs::path path = path_of(all.back());
  Checkpoint checkpoint;
  checkpoint.state = read_state(path / "state.json");
  require(checkpoint.state.trainer.step == all.back(), path.string(), ": state.json is of step ",
          checkpoint.state.trainer.step);
  checkpoint.tensors.model = io::read_safetensors(path / "model.safetensors");
  checkpoint.tensors.optimizer = io::read_safetensors(path / "optimizer.safetensors");
  return checkpoint;
}

void CheckpointStore::remove(std::int64_t step) const {
  // Half of a directory must not look like a checkpoint.
  const fs::path hidden = path_ / concat(kHidden, step, ".old");
  put_in_place(path_of(step), hidden);
  std::error_code error;
  fs::remove_all(hidden, error);
  if (error) io::fail_errno(error.value(), hidden, "cannot be removed");
}

void write_texts(const fs::path& directory, const CheckpointTexts& texts) {
  io::write_file(directory / "config.json", texts.config_json);
  if (!texts.tokenizer_json.empty()) io::write_file(directory / "tokenizer.json", texts.tokenizer_json);
  if (!texts.generation_config_json.empty())
    io::write_file(directory / "generation_config.json", texts.generation_config_json);
}

}  // namespace krait
