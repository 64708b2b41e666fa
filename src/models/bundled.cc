#include "models/bundled.h"

// Each file becomes read-only data between two symbols. 64-byte alignment, as the tensors in a checkpoint
// are aligned relative to its beginning.
#define KRAIT_BUNDLE(symbol, file)                                                                       \
  __asm__(                                                                                               \
      ".section .rodata\n"                                                                               \
      ".balign 64\n"                                                                                     \
      ".global krait_bundled_" #symbol                                                                   \
      "\n"                                                                                               \
      "krait_bundled_" #symbol                                                                           \
      ":\n"                                                                                              \
      ".incbin \"" KRAIT_MODELS_DIR "/" file                                                             \
      "\"\n"                                                                                             \
      ".global krait_bundled_" #symbol                                                                   \
      "_end\n"                                                                                           \
      "krait_bundled_" #symbol                                                                           \
      "_end:\n"                                                                                          \
      ".byte 0\n"                                                                                        \
      ".previous\n");                                                                                    \
  extern "C" const std::byte krait_bundled_##symbol[];                                                   \
  extern "C" const std::byte krait_bundled_##symbol##_end[];                                             \
  namespace krait::bundled {                                                                             \
  std::span<const std::byte> symbol() { return {krait_bundled_##symbol, krait_bundled_##symbol##_end}; } \
  }

KRAIT_BUNDLE(shakespeare_config, "shakespeare/config.json")
KRAIT_BUNDLE(shakespeare_tokenizer, "shakespeare/tokenizer.json")
KRAIT_BUNDLE(shakespeare_weights, "shakespeare/model.safetensors")
KRAIT_BUNDLE(gpt_neox_tokenizer, "gpt-neox/tokenizer.json")
