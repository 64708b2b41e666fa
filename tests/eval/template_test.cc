#include "eval/template.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "io/scratch.h"

namespace krait {
namespace {

using Json = nlohmann::json;

const Json& document() {
  static const Json document = Json::parse(R"({
    "question": "Why?", "text": "the quick  brown fox", "n": 3, "half": 0.5,
    "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "key": " B", "list": [1, 2, 3, 4],
    "big": 9223372036854775807, "huge": 9223372036854775808})");
  return document;
}

Json value(std::string_view text) { return evaluate_template(text, document()); }

TEST(Template, Texts) {
  EXPECT_EQ(value("as it is"), "as it is");
  EXPECT_EQ(value("Q: {{question}}\nA:"), "Q: Why?\nA:");
  EXPECT_EQ(value("{{ n }} of {{n}}\n"), "3 of 3\n");
  EXPECT_EQ(value("{{ '}}' + \"{{\" }}"), "}}{{");
  EXPECT_EQ(value("{{''}}{{n}}"), "3");
  EXPECT_EQ(value("{}} { {"), "{}} { {");
}

TEST(Template, ALoneExpressionKeepsItsType) {
  EXPECT_EQ(value("{{n}}"), 3);
  EXPECT_EQ(value("{{choices.text}}"), Json({"a", "b", "c"}));
  EXPECT_EQ(value("{{[question, 'No']}}"), Json({"Why?", "No"}));
  EXPECT_EQ(value("{{[]}}"), Json::array());
}

TEST(Template, Expressions) {
  EXPECT_EQ(value("{{n + 1}}"), 4);
  EXPECT_EQ(value("{{'n' ~ n}}"), "n3");
  EXPECT_EQ(value("{{choices['label'][0]}}{{choices.label[-1]}}"), "AC");
  EXPECT_EQ(value("{{list[1:3]}}"), Json({2, 3}));
  EXPECT_EQ(value("{{list[:-1]}}"), Json({1, 2, 3}));
  EXPECT_EQ(value("{{list[-2:]}}"), Json({3, 4}));
  EXPECT_EQ(value("{{list[3:1]}}"), Json::array());
  EXPECT_EQ(value("{{list[n]}}"), 4);
  EXPECT_EQ(value("{{(question + ' ').strip()}}"), "Why?");
  EXPECT_EQ(value(R"({{'a\n\t\\\'' + "\""}})"), "a\n\t\\'\"");
}

TEST(Template, Methods) {
  EXPECT_EQ(value("{{text.split(' ')}}"), Json({"the", "quick", "", "brown", "fox"}));
  EXPECT_EQ(value("{{text.split()}}"), Json({"the", "quick", "brown", "fox"}));
  EXPECT_EQ(value("{{text.split(' ')[:-1]|join(' ')}}"), "the quick  brown");
  EXPECT_EQ(value("{{' '+text.split(' ')[-1]}}"), " fox");
  EXPECT_EQ(value("{{choices.label.index(key.lstrip())}}"), 1);
  EXPECT_EQ(value("{{'-'.join(choices.text)}}"), "a-b-c");
  EXPECT_EQ(value("{{text.replace('o', '0').rstrip()}}"), "the quick  br0wn f0x");
}

TEST(Template, Filters) {
  EXPECT_EQ(value("{{key|trim}}"), "B");
  EXPECT_EQ(value("{{list|join}}"), "1234");
  EXPECT_EQ(value("{{list|length}}"), 4);
  EXPECT_EQ(value("{{question|length}}"), 4);
  EXPECT_EQ(value("{{choices.text|first + choices.text|last}}"), "ac");
}

TEST(Template, BoundsWhatItMakes) {
  const std::string deep = "{{" + std::string(100000, '(');
  EXPECT_MESSAGE(value(deep + "n}}"), "is nested more than 64 deep");
  std::string longer = "{{text";
  for (int i = 0; i < 10; ++i) longer += ".replace('o', 'oooooooooooooooo')";
  EXPECT_MESSAGE(value(longer + "}}"), "makes a text of more than 16777216 bytes");
}

TEST(Template, RefusesWhatItDoesNotUnderstand) {
  for (const auto& [text, part] : std::vector<std::pair<const char*, const char*>>{
           {"{{answer}}", "no field 'answer'"},
           {"{{choices.name}}", "there is no 'name' in a value that is of type object"},
           {"{% if n %}{% endif %}", "'{%' is not understood"},
           {"{{question", "a {{ has no }}"},
           {"{{question - n}}", "'- n' is not understood"},
           {"{{'abc}}", "has no }}"},
           {"{{question.upper()}}", "method 'upper' is not understood, expected index, join"},
           {"{{question|upper}}", "filter 'upper' is not understood, expected first, join"},
           {"{{list[4]}}", "index 4 in a list of 4"},
           {"{{list[}}", "ends where a value was expected"},
           {"{{question + n}}", "the right side of + is an integer, expected a text"},
           {"{{question[0]}}", "what [] stands behind is of type string, expected a list"},
           {"{{choices.label.index('D')}}", "\"D\" is not in the list"},
           {"a {{half}}", "a value is of type number, expected a text"},
           {"{{text.split('')}}", "the separator of split is empty"},
           {"{{text.strip('x')}}", "strip has 1 arguments, expected 0"},
           {"{{n + 9223372036854775807}}", "'9223372036854775807' is too large"},
           {"{{big + n}}", "9223372036854775807 + 3 is too large"},
           {"a {{huge}}", "a value is of type number, expected a text"},
           {"{{}}", "ends where a value was expected"}}) {
    EXPECT_MESSAGE(value(text), part) << text;
    EXPECT_MESSAGE(value(text), "template \"") << text;
  }
}

}  // namespace
}  // namespace krait
