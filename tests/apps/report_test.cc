#include <filesystem>

#include "apps/process.h"

namespace krait::cli {
namespace {

TEST(Report, WritesAPage) {
  const io::Scratch scratch;
  const std::string run = scratch.path().string();
  scratch.put("metrics.jsonl", "{\"step\":1,\"loss\":2.5,\"lr\":0.001}\n{\"step\":2,\"los");
  scratch.put("settings.json", "{\"batch_size\": 8}");
  EXPECT_EQ(krait_ok({"report", run}).out, run + "/report.html\n");
  const std::string page = read_file(run + "/report.html");
  EXPECT_TRUE(page.starts_with("<!DOCTYPE html>")) << page.substr(0, 100);
  EXPECT_NE(page.find("batch_size"), std::string::npos);

  const std::string elsewhere = (scratch / "page.html").string();
  EXPECT_EQ(krait_ok({"report", run, "--out", elsewhere, "--quiet"}).out, "");
  EXPECT_EQ(read_file(elsewhere), page);
}

TEST(Report, NamesWhatIsWrong) {
  const io::Scratch scratch;
  const std::string run = scratch.path().string();
  expect_refusal({"report"}, 2, {"directory", "required", "krait report --help"});
  expect_refusal({"report", (scratch / "nowhere").string()}, 1, {"nowhere: no such directory"});
  expect_refusal({"report", run}, 1, {run, "metrics.jsonl"});
  scratch.put("metrics.jsonl", "{\"step\":1,\"loss\":2.5}\nnonsense\n{\"step\":3,\"loss\":2}\n");
  expect_refusal({"report", run}, 1, {"metrics.jsonl: line 2", "JSON"});
  EXPECT_FALSE(std::filesystem::exists(scratch / "report.html"));
  scratch.put("metrics.jsonl", "");
  expect_refusal({"report", run, "--out", (scratch / "no/page.html").string()}, 1, {"no/page.html"});
}

}  // namespace
}  // namespace krait::cli
