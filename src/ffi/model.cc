// Loading, describing, running and saving models (krait/models/*.h, krait/eval/score.h).
#include "ffi/model.h"

#include <tvm/ffi/container/tuple.h>

#include "krait/core/error.h"
#include "krait/eval/score.h"
#include "krait/models/describe.h"
#include "krait/models/save.h"

namespace krait::ffi {
namespace {

// The bundled model where no name is given.
ModelRef model_load(const OptionalWord& name, const Word& device, const OptionalWord& dtype,
                    const OptionalWord& revision, const OptionalWord& cache_dir,
                    const tvm::ffi::Optional<bool>& offline, bool progress, std::int64_t threads) {
  const Device where = parse_device(text_of(device));
  const LoadOptions load_options{.dtype = dtype_of(dtype)};
  std::vector<std::pair<LogLevel, std::string>> messages;
  const SourceOptions source{
      .revision = revision,
      .cache_dir = cache_dir,
      .offline = offline.has_value() ? std::optional<bool>(*offline) : std::nullopt,
      .progress = progress,
      .cancelled = by_signals(),
      .log = [&](LogLevel level, std::string_view text) { messages.emplace_back(level, text); }};
  const ModelFiles files = name.has_value() ? open_source(text_of(*name), source) : open_bundled_model();
  ModelFiles texts = files;
  texts.tensors.clear();
  const ModelRef model(tvm::ffi::make_object<ModelObject>(
      where, threads_of(threads), std::move(texts),
      [&](Context& ctx) { return load_language_model(ctx, files, load_options); }));
  for (const auto& [level, text] : messages) model->add_message(level, text);
  return model;
}

ModelRef model_from_config(const Word& config, const Word& name, std::int64_t seed, const OptionalWord& dtype,
                           const Word& device, std::int64_t threads) {
  const ModelFiles files{.name = text_of(name), .config_json = text_of(config)};
  const DType matrices = dtype_of(dtype).value_or(DType::f32);
  return ModelRef(tvm::ffi::make_object<ModelObject>(
      parse_device(text_of(device)), threads_of(threads), files, [&](Context& ctx) {
        LanguageModel model(parse_config(files.config_json, files.name));
        model.initialize(static_cast<std::uint64_t>(seed), matrices);
        model.to_device(ctx);
        return model;
      }));
}

Word model_name(const ModelRef& model) { return model->files().name; }
Word model_device(const ModelRef& model) { return name_of(model->device()); }
Word model_format(const ModelRef& model) { return std::string(name_of(model->model().config().format)); }
std::int64_t model_vocab_size(const ModelRef& model) { return model->model().config().vocab_size; }
std::int64_t model_padded_vocab_size(const ModelRef& model) {
  return model->model().config().padded_vocab_size();
}
tvm::ffi::Shape model_eos_token_ids(const ModelRef& model) {
  const auto& ids = model->model().config().eos_token_ids;
  return tvm::ffi::Shape(ids.begin(), ids.end());
}
TokenizerRef model_tokenizer(const ModelRef& model) { return model->tokenizer(); }

// "warning", "info" or "debug", and the text, one after the other.
Words model_take_messages(const ModelRef& model) {
  Words words;
  for (const auto& [level, text] : model->take_messages()) {
    words.push_back(level == LogLevel::warning ? "warning" : level == LogLevel::info ? "info" : "debug");
    words.push_back(text);
  }
  return words;
}

SaveFormat save_format_of(const Word& word) {
  return choice<SaveFormat>(
      "model", "format", word,
      {{"krait", SaveFormat::krait}, {"upstream", SaveFormat::upstream}, {"hf", SaveFormat::hf}});
}

// The config.json that the format writes.
Word model_config(const ModelRef& model, const Word& format) {
  return config_json(model->model().config(), save_format_of(format));
}

void model_save(const ModelRef& model, const Word& directory, const Word& format, const OptionalWord& dtype) {
  const Exclusive use(model);
  const std::string tokenizer = tokenizer_json_of(model->files());
  save_language_model(
      model->model(), text_of(directory),
      {.format = save_format_of(format), .dtype = dtype_of(dtype), .tokenizer_json = tokenizer});
}

using Entries = tvm::ffi::Array<tvm::ffi::Tuple<Word, std::int64_t>>;

Entries entries_of(const std::map<std::string, std::int64_t>& map) {
  Entries entries;
  for (const auto& [name, value] : map) entries.push_back(tvm::ffi::Tuple<Word, std::int64_t>(name, value));
  return entries;
}

// The members of ModelDescription that ModelConfig has not.
using DescriptionTuple = tvm::ffi::Tuple<Word, std::int64_t, std::int64_t, Entries, Entries, std::int64_t,
                                         std::int64_t, std::int64_t>;
DescriptionTuple model_describe(const ModelRef& model) {
  const ModelDescription& d = model->description();
  return DescriptionTuple(d.architecture, d.n_layer, d.parameters, entries_of(d.parameters_by_part),
                          entries_of(d.bytes_by_dtype), d.weight_bytes, d.state_bytes_per_sequence,
                          d.state_bytes_per_token);
}

// Name, shape and dtype of each parameter.
tvm::ffi::Array<tvm::ffi::Tuple<Word, tvm::ffi::Shape, Word>> model_parameters(const ModelRef& model) {
  const Exclusive use(model);
  tvm::ffi::Array<tvm::ffi::Tuple<Word, tvm::ffi::Shape, Word>> all;
  model->model().visit([&](const Parameter& p) {
    all.push_back(tvm::ffi::Tuple<Word, tvm::ffi::Shape, Word>(
        p.name, tvm::ffi::Shape(p.shape.begin(), p.shape.end()), std::string(name_of(p.tensor.dtype()))));
  });
  return all;
}

// Copies one parameter, converted where `out` has another dtype.
void model_read_parameter(const ModelRef& model, const Word& name, const Given& out) {
  const Exclusive use(model);
  Operands of("parameter");
  const Tensor to = of("out", out);
  const std::string wanted = text_of(name);
  bool found = false;
  model->model().visit([&](const Parameter& p) {
    if (p.name != wanted) return;
    found = true;
    require(to.shape() == p.shape, wanted, ": out has shape ", to.shape(), ", expected ", p.shape);
    to.copy_from(use.context().to_host(p.tensor));
  });
  require(found, "the model has no parameter ", wanted);
}

// The states of `states` for as many rows; empty where None.
std::vector<StateRef> states_of(const ModelRef& model,
                                const tvm::ffi::Optional<tvm::ffi::Array<StateRef>>& states,
                                std::size_t rows) {
  if (!states.has_value()) return {};
  std::vector<StateRef> all((*states).begin(), (*states).end());
  require(all.size() == rows, all.size(), " states for ", rows, " rows of ids, expected one for each");
  for (std::size_t i = 0; i < all.size(); ++i)
    require(all[i]->model().get() == model.get(), "state ", i,
            " belongs to another model, expected one of this model's new_state()");
  return all;
}

void note_positions(const std::vector<StateRef>& states) {
  for (const StateRef& state : states) state->note_position();
}

// Rows of ids, each on top of its state or from an empty one. With `last` the logits after the last token of
// each, out (n, V); else of all tokens, row after row, out (T, V). f32 on the CPU.
void model_logits(const ModelRef& model, const Given& ids, const Given& offsets,
                  const tvm::ffi::Optional<tvm::ffi::Array<StateRef>>& states, bool last, const Given& out) {
  const Exclusive use(model);
  Context& ctx = use.context();
  Operands of("logits");
  const std::vector<std::span<const std::int64_t>> rows = rows_of(of("ids", ids), of("offsets", offsets));
  const std::vector<StateRef> held = states_of(model, states, rows.size());
  std::vector<Sequence> sequences;
  std::vector<std::int64_t> first_row{0};
  for (std::size_t i = 0; i < rows.size(); ++i) {
    sequences.push_back({.ids = rows[i], .state = held.empty() ? nullptr : &held[i]->state()});
    first_row.push_back(first_row.back() + (last ? 1 : static_cast<std::int64_t>(rows[i].size())));
  }
  const Tensor to = of("out", out);
  const Dims expected{first_row.back(), model->model().config().padded_vocab_size()};
  require(to && to.shape() == expected && to.dtype() == DType::f32 && to.device() == Device{},
          "[logits] expected out of shape ", expected, " and dtype f32 on the CPU");
  try {
    if (last) {
      if (!sequences.empty()) to.copy_from(ctx.to_host(model->model().logits(ctx, sequences)));
    } else {
      // Pass by pass, so that there is no second copy of all logits.
      model->model().for_each_pass(ctx, sequences, [&](const LanguageModel::Pass& pass) {
        const Tensor logits = ctx.to_host(model->model().head(ctx, pass.hidden));
        for (std::int64_t i = 0; i < pass.batch.size(); ++i) {
          const auto at = static_cast<std::size_t>(i);
          const std::int64_t begin = first_row[static_cast<std::size_t>(pass.sequence[at])] + pass.begins[at];
          const Tensor part = logits.slice(0, pass.batch.begin(i), pass.batch.end(i));
          to.slice(0, begin, begin + part.size(0)).copy_from(part);
        }
      });
    }
  } catch (...) {
    note_positions(held);
    throw;
  }
  note_positions(held);
}

// One token for each state, ids (n); out (n, V).
void model_step(const ModelRef& model, const Given& ids, const tvm::ffi::Array<StateRef>& states,
                const Given& out) {
  const Exclusive use(model);
  Operands of("step");
  const Tensor tokens = of("ids", ids);
  const Tensor to = of("out", out);
  require(tokens && tokens.ndim() == 1 && tokens.dtype() == DType::i64 && tokens.is_contiguous(),
          "[step] ids: expected a contiguous tensor (n) of i64 on the CPU");
  const std::vector<StateRef> held = states_of(model, states, static_cast<std::size_t>(tokens.numel()));
  const Dims expected{tokens.numel(), model->model().config().padded_vocab_size()};
  require(to && to.shape() == expected && to.dtype() == DType::f32, "[step] expected out of shape ", expected,
          " and dtype f32 on the CPU");
  if (held.empty()) return;
  std::vector<State*> pointers;
  for (const StateRef& state : held) pointers.push_back(&state->state());
  Context& ctx = use.context();
  const Tensor& logits = held[0]->shared()->stepper.step(tokens.span<std::int64_t>(), pointers);
  note_positions(held);
  to.copy_from(ctx.to_host(logits));
}

// Mean loss in nats, perplexity, bits per byte where there is a text, predictions.
using ScoreTuple = tvm::ffi::Tuple<double, double, tvm::ffi::Optional<double>, std::int64_t>;

ScoreTuple tuple_of(const Score& score) {
  tvm::ffi::Optional<double> bits;
  if (score.bits_per_byte) bits = *score.bits_per_byte;
  return ScoreTuple(score.loss, score.perplexity, bits, score.tokens);
}

ScoreTuple model_score_ids(const ModelRef& model, const Given& ids) {
  const Exclusive use(model);
  Operands of("score");
  return tuple_of(score_ids(use.context(), model->model(), of("ids", ids)));
}

ScoreTuple model_score_text(const ModelRef& model, const Word& text, std::int64_t block) {
  const TokenizerRef tokenizer = model->tokenizer();
  const Exclusive use(model);
  return tuple_of(score_text(use.context(), model->model(), tokenizer->tokenizer,
                             std::string_view(text.data(), text.size()), block));
}

}  // namespace
}  // namespace krait::ffi

KRAIT_FFI(model_load, krait::ffi::model_load)
KRAIT_FFI(model_from_config, krait::ffi::model_from_config)
KRAIT_FFI(model_name, krait::ffi::model_name)
KRAIT_FFI(model_device, krait::ffi::model_device)
KRAIT_FFI(model_format, krait::ffi::model_format)
KRAIT_FFI(model_vocab_size, krait::ffi::model_vocab_size)
KRAIT_FFI(model_padded_vocab_size, krait::ffi::model_padded_vocab_size)
KRAIT_FFI(model_eos_token_ids, krait::ffi::model_eos_token_ids)
KRAIT_FFI(model_config, krait::ffi::model_config)
KRAIT_FFI(model_tokenizer, krait::ffi::model_tokenizer)
KRAIT_FFI(model_take_messages, krait::ffi::model_take_messages)
KRAIT_FFI(model_save, krait::ffi::model_save)
KRAIT_FFI(model_describe, krait::ffi::model_describe)
KRAIT_FFI(model_parameters, krait::ffi::model_parameters)
KRAIT_FFI(model_read_parameter, krait::ffi::model_read_parameter)
KRAIT_FFI(model_logits, krait::ffi::model_logits)
KRAIT_FFI(model_step, krait::ffi::model_step)
KRAIT_FFI(model_score_ids, krait::ffi::model_score_ids)
KRAIT_FFI(model_score_text, krait::ffi::model_score_text)
