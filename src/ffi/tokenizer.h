// Tokenizers as callers of the C ABI hold them.
#pragma once

#include <tvm/ffi/object.h>

#include <string>
#include <utility>

#include "krait/tokenizer/tokenizer.h"

namespace krait::ffi {

class TokenizerObject final : public tvm::ffi::Object {
 public:
  // Of the content of a tokenizer.json; `name` stands for the file in messages.
  TokenizerObject(std::string content, const std::string& name)
      : tokenizer(Tokenizer::from_json(content, name)), json(std::move(content)) {}

  const Tokenizer tokenizer;
  const std::string json;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("krait.Tokenizer", TokenizerObject, tvm::ffi::Object);
};

class TokenizerRef : public tvm::ffi::ObjectRef {
 public:
  explicit TokenizerRef(tvm::ffi::ObjectPtr<TokenizerObject> object) : ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(TokenizerRef, tvm::ffi::ObjectRef, TokenizerObject);
};

}  // namespace krait::ffi
