// Embeds Krait: loads a checkpoint and streams its continuation of a prompt.
//   example_generate [MODEL [PROMPT]]
#include <krait/generate/generate.h>
#include <krait/models/load.h>

#include <exception>
#include <iostream>

int main(int argc, char** argv) try {
  krait::Context ctx;
  const krait::ModelFiles files = krait::open_model(argc > 1 ? argv[1] : "");  // "": the bundled model
  const krait::LanguageModel model = krait::load_language_model(ctx, files);
  const krait::Tokenizer tokenizer = krait::load_tokenizer(files);

  krait::GenerateOptions options{.max_new_tokens = 64, .seed = 1};
  options.on_text = [](std::int64_t, std::string_view text) { std::cout << text << std::flush; };
  const std::string prompt = argc > 2 ? argv[2] : "ROMEO:";
  const std::vector<std::vector<std::int64_t>> prompts{
      tokenizer.encode(prompt, {.add_special_tokens = true})};
  const auto result = krait::generate(ctx, model, &tokenizer, prompts, options);

  std::cout << "\n" << result.new_tokens << " tokens in " << result.decode_seconds << " s\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
