#include "models/bundled.h"

// Each file becomes read-only data between two symbols. 64-byte alignment, as the tensors in a checkpoint
// are aligned relative to its beginning.
#define KRAIT_BUNDLE(View, symbol, file)                                           \
  __asm__(                                                                         \
      ".section .rodata\n"                                                         \
      ".balign 64\n"                                                               \
      ".global krait_bundled_" #symbol                                             \
      "\n"                                                                         \
      "krait_bundled_" #symbol                                                     \
      ":\n"                                                                        \
      ".incbin \"" KRAIT_MODELS_DIR "/" file                                       \
      "\"\n"                                                                       \
      ".global krait_bundled_" #symbol                                             \
      "_end\n"                                                                     \
      "krait_bundled_" #symbol                                                     \
      "_end:\n"                                                                    \
      ".byte 0\n"                                                                  \
      ".previous\n");                                                              \
  extern "C" const View::value_type krait_bundled_##symbol[];                      \
  extern "C" const View::value_type krait_bundled_##symbol##_end[];                \
  namespace krait::bundled {                                                       \
  View symbol() { return {krait_bundled_##symbol, krait_bundled_##symbol##_end}; } \
  }

KRAIT_BUNDLE(std::string_view, shakespeare_config, "shakespeare/config.json")
KRAIT_BUNDLE(std::string_view, shakespeare_tokenizer, "shakespeare/tokenizer.json")
KRAIT_BUNDLE(std::span<const std::byte>, shakespeare_weights, "shakespeare/model.safetensors")
KRAIT_BUNDLE(std::string_view, gpt_neox_tokenizer, "gpt-neox/tokenizer.json")
