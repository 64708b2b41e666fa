#include "eval/python_text.h"

#include <gtest/gtest.h>

namespace krait {
namespace {

TEST(PythonText, Strips) {
  EXPECT_EQ(strip(" \t\r\n\v\f\x1c a b \x1f"), "a b");
  EXPECT_EQ(strip("\u00a0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\u0085x\u3000\u0085"), "x");
  EXPECT_EQ(strip("\u200bx\ufeff"), "\u200bx\ufeff");  // no width, and no white space
  EXPECT_EQ(strip_left("  a "), "a ");
  EXPECT_EQ(strip_right("  a "), "  a");
  EXPECT_EQ(strip(""), "");
  EXPECT_EQ(strip(" \n "), "");
  // Bytes that are not UTF-8 stay: half a no-break space is none.
  EXPECT_EQ(strip_right("a\xa0"), "a\xa0");
  EXPECT_EQ(strip_right("\x85"), "\x85");
}

TEST(PythonText, CountsCharacters) {
  EXPECT_EQ(count_characters(""), 0);
  EXPECT_EQ(count_characters("abc"), 3);
  EXPECT_EQ(count_characters("\u00e9\u4e2d\U0001f600"), 3);
  EXPECT_EQ(count_characters("\xff\xe4"), 2);
}

TEST(PythonText, CountsWords) {
  EXPECT_EQ(count_words(""), 1);
  EXPECT_EQ(count_words("one"), 1);
  EXPECT_EQ(count_words("one  two\n\nthree"), 3);
  EXPECT_EQ(count_words(" one "), 3);
  EXPECT_EQ(count_words("one\u3000\u00a0two"), 2);
}

}  // namespace
}  // namespace krait
