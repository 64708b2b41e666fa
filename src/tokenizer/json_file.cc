#include "tokenizer/json_file.h"

#include <utility>

#include "krait/core/error.h"
#include "tokenizer/component.h"
#include "tokenizer/unicode.h"

namespace krait::tokenizer {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxDepth = 64;

// Receives the parser's events and throws Error at the first that does not fit.
class Reader final : public nlohmann::json_sax<json> {
 public:
  explicit Reader(std::string_view name) : name_(name) {}

  JsonFile take() && {
    require(file_.rest.is_object(), name_, ": the file is ", file_.rest.type_name(), ", expected an object");
    const Fields model(Fields(file_.rest, std::string(name_)).field("model"), concat(name_, ": model"));
    const std::string type = model.text("type", "BPE");
    require(type == "BPE", name_, ": model ", in_quotes(type), " is not supported, expected BPE");
    require(has_vocabulary_, name_, ": there is no model.vocab");
    require(has_merges_, name_, ": there is no model.merges");
    file_.vocabulary.index(name_);
    return std::move(file_);
  }

  bool null() override { return value(nullptr); }
  bool boolean(bool v) override { return value(v); }
  bool number_integer(number_integer_t v) override { return integer(v); }
  bool number_unsigned(number_unsigned_t v) override {
    if (section_ == Section::vocabulary && v > static_cast<number_unsigned_t>(kMaxVocabulary)) {
      refuse_in_section(concat("the token ", in_quotes(token_), " has id ", v));
    }
    return section_ == Section::vocabulary ? integer(static_cast<std::int64_t>(v)) : value(v);
  }
  bool number_float(number_float_t v, const string_t&) override { return value(v); }
  bool binary(binary_t&) override { return value(nullptr); }  // JSON text has none

  bool string(string_t& v) override {
    if (section_ == Section::merges) {
      merge_text(v);
      return true;
    }
    return value(std::move(v));
  }

  bool key(string_t& v) override {
    if (section_ == Section::vocabulary) {
      token_ = v;
    } else {
      key_ = v;
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (section_ != Section::none) refuse_in_section("an object");
    const bool is_vocabulary = in_model() && key_ == "vocab";
    open(json::object());
    if (is_vocabulary) enter(Section::vocabulary, has_vocabulary_);
    return true;
  }
  bool end_object() override { return close(); }

  bool start_array(std::size_t) override {
    if (section_ == Section::merges && !in_pair_) {
      in_pair_ = true;
      pair_.clear();
      return true;
    }
    if (section_ != Section::none) refuse_in_section("an array");
    const bool is_merges = in_model() && key_ == "merges";
    open(json::array());
    if (is_merges) enter(Section::merges, has_merges_);
    return true;
  }
  bool end_array() override {
    if (!in_pair_) return close();
    in_pair_ = false;
    if (pair_.size() != 2) refuse_in_section(concat("a list of ", pair_.size(), " tokens"));
    file_.merges.add(pair_[0], pair_[1]);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    std::string_view why = error.what();
    if (const auto at = why.find("] "); at != std::string_view::npos) why.remove_prefix(at + 2);
    fail(ErrorKind::invalid_argument, name_, ": not JSON at byte ", position, ": ", why);
  }

 private:
  enum class Section { none, vocabulary, merges };

  bool in_model() const { return stack_.size() == 2 && in_model_; }

  void enter(Section section, bool& seen) {
    require(!seen, name_, ": model.", key_, " occurs twice");
    seen = true;
    section_ = section;
  }

  [[noreturn]] void refuse_in_section(std::string_view found) const {
    if (section_ == Section::vocabulary) {
      fail(ErrorKind::invalid_argument, name_, ": in model.vocab, at ", in_quotes(token_), ": found ", found,
           ", expected an id from 0 to ", kMaxVocabulary - 1);
    }
    fail(ErrorKind::invalid_argument, name_, ": in model.merges, entry ", file_.merges.size(), ": found ",
         found, ", expected \"a b\" or [\"a\", \"b\"]");
  }

  bool integer(std::int64_t v) {
    if (section_ != Section::vocabulary) return value(v);
    file_.vocabulary.add(token_, v, name_);
    return true;
  }

  void merge_text(const std::string& text) {
    if (in_pair_) {
      pair_.push_back(text);
      return;
    }
    if (text.starts_with("#version")) return;
    const auto space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      refuse_in_section(in_quotes(text));
    }
    file_.merges.add(std::string_view(text).substr(0, space), std::string_view(text).substr(space + 1));
  }

  // Puts `v` where the parser stands and returns its place.
  json* place(json v) {
    if (stack_.empty()) {
      file_.rest = std::move(v);
      return &file_.rest;
    }
    json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(v));
      return &parent.back();
    }
    json& slot = parent[key_];
    slot = std::move(v);
    return &slot;
  }

  bool value(json v) {
    if (section_ != Section::none) refuse_in_section(v.is_null() ? "null" : v.type_name());
    place(std::move(v));
    return true;
  }

  void open(json container) {
    require(stack_.size() < kMaxDepth, name_, ": nests deeper than ", kMaxDepth, " levels");
    if (stack_.size() == 1) in_model_ = key_ == "model";
    stack_.push_back(place(std::move(container)));
  }

  bool close() {
    section_ = Section::none;
    stack_.pop_back();
    return true;
  }

  std::string_view name_;
  JsonFile file_;
  std::vector<json*> stack_;
  std::string key_;
  bool in_model_ = false;  // the child of the root that is open is "model"
  bool has_vocabulary_ = false;
  bool has_merges_ = false;

  Section section_ = Section::none;
  std::string token_;  // key of the vocabulary entry
  std::vector<std::string> pair_;
  bool in_pair_ = false;
};

}  // namespace

void MergeList::add(std::string_view left, std::string_view right) {
  entries_.push_back({text_.size(), left.size(), right.size()});
  text_.append(left).append(right);
}

JsonFile read_json_file(std::string_view json_text, std::string_view name) {
  Reader reader(name);
  json::sax_parse(json_text.begin(), json_text.end(), &reader);
  return std::move(reader).take();
}

}  // namespace krait::tokenizer
