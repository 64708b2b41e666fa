// Loading a tokenizer, and encoding and decoding Shakespeare with it, in bytes of text per second.
#include <benchmark/benchmark.h>

#include <fstream>
#include <iterator>
#include <string>

#include "krait/tokenizer/tokenizer.h"

namespace krait {
namespace {

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

const std::string kModels = KRAIT_SOURCE_DIR "/models";

std::string shakespeare() { return read_file(KRAIT_SOURCE_DIR "/tests/data/tinyshakespeare.txt"); }

void set_rate(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes) * state.iterations());
}

void load(benchmark::State& state) {
  const std::string path = kModels + "/gpt-neox/tokenizer.json";
  for (auto _ : state) benchmark::DoNotOptimize(Tokenizer::from_file(path));
}
BENCHMARK(load)->Unit(benchmark::kMillisecond);

void encode(benchmark::State& state, const std::string& model) {
  const Tokenizer tokenizer = Tokenizer::from_file(kModels + "/" + model + "/tokenizer.json");
  const std::string text = shakespeare();
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.encode(text));
  set_rate(state, text.size());
}
BENCHMARK_CAPTURE(encode, gpt_neox, "gpt-neox")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(encode, shakespeare, "shakespeare")->Unit(benchmark::kMillisecond);

// The pre-tokenizers of Falcon-Mamba's file over GPT-NeoX's vocabulary: the general path.
void encode_falcon_style(benchmark::State& state) {
  std::string json = read_file(kModels + "/gpt-neox/tokenizer.json");
  const std::string from = R"("pre_tokenizer":)";
  const auto at = json.find(from);
  const auto end = json.find("\"post_processor\"", at);
  json.replace(at, end - at, from + R"({"type":"Sequence","pretokenizers":[
      {"type":"Punctuation","behavior":"Contiguous"},
      {"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true},
      {"type":"Digits","individual_digits":false},
      {"type":"Split","pattern":{"Regex":"[0-9][0-9][0-9]"},"behavior":"Isolated","invert":false}]},)");
  const Tokenizer tokenizer = Tokenizer::from_json(json, "tokenizer.json");
  const std::string text = shakespeare();
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.encode(text));
  set_rate(state, text.size());
}
BENCHMARK(encode_falcon_style)->Unit(benchmark::kMillisecond);

// One piece that nothing cuts: merging must not be quadratic.
void encode_run_of_letters(benchmark::State& state) {
  const Tokenizer tokenizer = Tokenizer::from_file(kModels + "/gpt-neox/tokenizer.json");
  const std::string text(std::size_t{1} << 20, 'a');
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.encode(text));
  set_rate(state, text.size());
}
BENCHMARK(encode_run_of_letters)->Unit(benchmark::kMillisecond);

void decode(benchmark::State& state) {
  const Tokenizer tokenizer = Tokenizer::from_file(kModels + "/gpt-neox/tokenizer.json");
  const std::string text = shakespeare();
  const auto ids = tokenizer.encode(text);
  for (auto _ : state) benchmark::DoNotOptimize(tokenizer.decode(ids));
  set_rate(state, text.size());
}
BENCHMARK(decode)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace krait
