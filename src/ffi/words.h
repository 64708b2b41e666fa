// The words that stand for the library's enums.
#pragma once

#include "ffi/convert.h"
#include "krait/ops/activation.h"
#include "krait/ops/causal_conv1d.h"
#include "krait/ops/norm.h"

namespace krait::ffi {

inline Activation activation_of(const char* op, const Word& word) {
  return choice<Activation>(op, "activation", word, {{"none", Activation::none}, {"silu", Activation::silu}});
}

inline NormKind norm_kind_of(const char* op, const Word& word) {
  return choice<NormKind>(op, "kind", word, {{"rms", NormKind::rms}, {"layer", NormKind::layer}});
}

inline GeluKind gelu_kind_of(const char* op, const Word& word) {
  return choice<GeluKind>(op, "kind", word, {{"exact", GeluKind::exact}, {"tanh", GeluKind::tanh}});
}

}  // namespace krait::ffi
