// Loading checkpoints that are not quite what they should be.
#include "krait/models/load.h"

#include <gtest/gtest.h>

#include <unistd.h>

#include <fstream>
#include <limits>

#include "krait/core/error.h"
#include "krait/io/safetensors.h"
#include "support/golden.h"

namespace krait {
namespace {

namespace fs = std::filesystem;
using testing::golden;
using testing::golden_array;
using testing::max_difference;
using testing::row_of;

class Load : public ::testing::Test {
 protected:
  Load() : directory_(fs::path(::testing::TempDir()) / concat("krait_load_", ::getpid())) {
    fs::remove_all(directory_);
    fs::create_directories(directory_);
    fs::copy(golden("hf-mamba-tiny"), directory_, fs::copy_options::recursive);
  }
  ~Load() override { fs::remove_all(directory_); }

  // The checkpoint with its tensors changed by `change`.
  template <typename Change>
  void rewrite(const Change& change) {
    io::TensorMap tensors = io::read_safetensors(golden("hf-mamba-tiny") / "model.safetensors");
    change(tensors);
    io::write_safetensors(directory_ / "model.safetensors", tensors);
  }

  void write(const std::string& name, const std::string& text) { std::ofstream(directory_ / name) << text; }

  std::string message() {
    try {
      load();
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  }

  LanguageModel load(const LoadOptions& options = {}) {
    Context ctx(
        ContextOptions{.log = [&](LogLevel, std::string_view text) { log_ += std::string(text) + "\n"; }});
    return load_language_model(ctx, open_model_directory(directory_), options);
  }

  Tensor logits_of(const LanguageModel& model) {
    Context ctx;
    State state = model.new_state();
    return model.logits(ctx, row_of(golden_array("hf-mamba-tiny", "input_ids.npy"), 0), state,
                        LogitRows::all);
  }

  fs::path directory_;
  std::string log_;
};

const std::string kNorm = "backbone.layers.1.norm.weight";

TEST_F(Load, MissingTensorIsNamed) {
  rewrite([](io::TensorMap& t) { t.erase(kNorm); });
  EXPECT_EQ(message(), directory_.string() + ": tensor " + kNorm + " is missing, expected shape (64,)");
}

TEST_F(Load, WrongShapeIsNamed) {
  rewrite([](io::TensorMap& t) { t[kNorm] = Tensor::zeros({32}); });
  EXPECT_EQ(message(), directory_.string() + ": tensor " + kNorm + " has shape (32,), expected (64,)");
}

TEST_F(Load, WrongDtypeIsNamed) {
  rewrite([](io::TensorMap& t) { t[kNorm] = Tensor::zeros({64}, DType::i32); });
  EXPECT_EQ(message(),
            directory_.string() + ": tensor " + kNorm + " has dtype i32, expected f32, bf16, f16 or f64");
}

TEST_F(Load, UnexpectedTensorIsNamed) {
  rewrite([](io::TensorMap& t) { t["backbone.layers.9.extra"] = Tensor::zeros({3}); });
  EXPECT_NE(message().find("unexpected tensor backbone.layers.9.extra of shape (3,)"), std::string::npos);
}

TEST_F(Load, TiedHeadMayBeThere) {
  rewrite([](io::TensorMap& t) { t["lm_head.weight"] = t.at("backbone.embeddings.weight"); });
  EXPECT_EQ(message(), "no error");
}

TEST_F(Load, OldEmbeddingName) {
  rewrite([](io::TensorMap& t) {
    t["backbone.embedding.weight"] = t.at("backbone.embeddings.weight");
    t.erase("backbone.embeddings.weight");
  });
  EXPECT_EQ(message(), "no error");
}

TEST_F(Load, NotFiniteIsAWarning) {
  rewrite([](io::TensorMap& t) {
    Tensor bad = t.at(kNorm).clone();
    bad.data<float>()[5] = std::numeric_limits<float>::quiet_NaN();
    t[kNorm] = bad;
    Tensor halves = t.at("backbone.norm_f.weight").to(DType::bf16);
    halves.data<bf16>()[63].bits = 0x7f80;
    t["backbone.norm_f.weight"] = halves;
  });
  EXPECT_EQ(message(), "no error");
  EXPECT_NE(log_.find("tensor " + kNorm + " has values that are NaN or infinite"), std::string::npos);
  EXPECT_NE(log_.find("backbone.norm_f.weight"), std::string::npos);
}

TEST_F(Load, FiniteWeightsWarnOfNothing) {
  load();
  EXPECT_EQ(log_, "");
}

TEST_F(Load, MissingFilesAreNamed) {
  fs::remove(directory_ / "model.safetensors");
  EXPECT_NE(message().find("model.safetensors"), std::string::npos);
  fs::remove(directory_ / "config.json");
  EXPECT_NE(message().find("no config.json"), std::string::npos);
  fs::remove_all(directory_);
  EXPECT_EQ(message(), directory_.string() + ": no such directory");
}

TEST_F(Load, BrokenConfigIsNamed) {
  write("config.json", "");
  EXPECT_NE(message().find("config.json: not JSON"), std::string::npos);
  write("config.json", R"({"model_type": "llama"})");
  EXPECT_NE(message().find("model_type is llama"), std::string::npos);
}

TEST_F(Load, SizesThatDoNotFitNameTheConfig) {
  write("config.json",
        R"({"d_model": 8, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2", "headdim": 2, "ngroups": 3}})");
  EXPECT_EQ(message(), directory_.string() + "/config.json: Mamba2: 8 heads are not a multiple of ngroups 3");
}

TEST_F(Load, AbsurdSizesDoNotAllocate) {
  write("config.json", R"({"model_type": "mamba", "hidden_size": 16777216, "num_hidden_layers": 10000,
                           "vocab_size": 2147483648, "state_size": 16777216})");
  EXPECT_NE(message().find("expected ("), std::string::npos);
}

TEST_F(Load, DtypesConvertOnRequest) {
  const Tensor want = logits_of(load());
  LanguageModel half = load({.dtype = DType::bf16});
  half.visit([](const Parameter& p) {
    EXPECT_EQ(p.tensor.dtype(), p.kind == ParameterKind::matrix ? DType::bf16 : DType::f32) << p.name;
  });
  const Tensor got = logits_of(half);
  EXPECT_LT(max_difference(got, want), 0.5);
  EXPECT_GT(max_difference(got, want), 0.0);
  EXPECT_LT(max_difference(logits_of(load({.dtype = DType::f16})), want), 0.1);
  EXPECT_THROW(load({.dtype = DType::i8}), Error);
}

TEST_F(Load, WeightsAreUsedInPlace) {
  const ModelFiles files = open_model_directory(directory_);
  Context ctx;
  LanguageModel model = load_language_model(ctx, files);
  model.visit([&](const Parameter& p) {
    if (!p.name.ends_with("in_proj.weight")) return;
    EXPECT_EQ(p.tensor.raw(), files.tensors.at(p.name).raw()) << p.name;
  });
}

TEST(Bundled, ModelAndTokenizersLoad) {
  Context ctx;
  const ModelFiles files = open_model("", hub::Options{});
  const LanguageModel model = load_language_model(ctx, files);
  const Tokenizer tokenizer = load_tokenizer(files);
  EXPECT_EQ(tokenizer.vocab_size(), model.config().vocab_size);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("ROMEO:\nO, speak again")), "ROMEO:\nO, speak again");
  EXPECT_EQ(gpt_neox_tokenizer().vocab_size(), 50277);
}

TEST(Bundled, UpstreamCheckpointsGetTheGptNeoxTokenizer) {
  ModelFiles files;
  files.name = "upstream";
  files.config_json = R"({"d_model": 8, "n_layer": 1, "vocab_size": 50277})";
  EXPECT_EQ(load_tokenizer(files).vocab_size(), 50277);
  files.config_json = R"({"d_model": 8, "n_layer": 1, "vocab_size": 277})";
  EXPECT_THROW((void)load_tokenizer(files), Error);
}

TEST(OpenModel, NamesThatAreNothing) {
  const auto message = [](const std::string& name) -> std::string {
    try {
      (void)open_model(name, hub::Options{.cache = ::testing::TempDir() + "krait_no_cache", .offline = true});
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(message("./nowhere/at/all"),
            "./nowhere/at/all: no such directory, nor a model of the hub (organisation/name[@revision])");
  EXPECT_NE(message("no-such-org/no-such-model").find("no such directory; as a model of the hub: "),
            std::string::npos);
}

}  // namespace
}  // namespace krait
