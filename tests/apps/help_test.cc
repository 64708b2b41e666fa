#include <fstream>

#include "apps/process.h"

namespace krait::cli {
namespace {

const std::vector<std::string> kCommands = {"generate", "logits",   "score",  "bench", "info",
                                            "tokenize", "download", "report", "eval"};

TEST(Help, NamesEveryCommandAndItsOptions) {
  const Outcome top = krait_ok({"--help"});
  for (const std::string& command : kCommands) {
    SCOPED_TRACE(command);
    EXPECT_NE(top.out.find("\n  " + command + " "), std::string::npos) << top.out;
    const Outcome help = krait_ok({command, "--help"});
    EXPECT_NE(help.out.find("Usage: krait " + command), std::string::npos) << help.out;
    EXPECT_NE(help.out.find("--quiet"), std::string::npos) << help.out;
  }
  EXPECT_NE(krait_ok({"generate", "--help"}).out.find("Tokens to make at most (default 128)"),
            std::string::npos);
}

TEST(Help, VersionNamesWhatWasBuilt) {
  const Outcome version = krait_ok({"--version"});
  EXPECT_TRUE(version.out.starts_with("krait 0.")) << version.out;
  for (const char* part :
       {"\ncompiler ", "\nprocessor ", "\nfeatures ", "\nbackends ", "Highway 1.", "oneDNN"})
    EXPECT_NE(version.out.find(part), std::string::npos) << part << " in " << version.out;
}

TEST(Help, ManPageHasEveryCommand) {
  const Outcome page = krait_ok({"man"});
  EXPECT_TRUE(page.out.starts_with(".TH KRAIT 1")) << page.out;
  for (const std::string& command : kCommands)
    EXPECT_NE(page.out.find("\n.SS krait " + command + "\n"), std::string::npos) << command;
  EXPECT_NE(page.out.find("\n.SS krait bench op\n"), std::string::npos);
  EXPECT_NE(page.out.find("\\fB\\-\\-repetition\\-penalty\\fR \\fIX\\fR\n"), std::string::npos);
  // The commands that make these pages are not for users.
  EXPECT_EQ(page.out.find("completion"), std::string::npos);
}

// What bash offers after `words`, the last of which is being typed.
std::string complete(const io::Scratch& scratch, const std::string& words) {
  const auto script =
      scratch.put("complete.sh", "source " + (scratch / "krait.bash").string() + "\nCOMP_WORDS=(" + words +
                                     ")\nCOMP_CWORD=$((${#COMP_WORDS[@]} - 1))\n_krait\n"
                                     "echo \"${COMPREPLY[*]}\" > " +
                                     (scratch / "reply").string() + "\n");
  EXPECT_EQ(std::system(("bash -eu " + script.string()).c_str()), 0) << words;
  return read_file((scratch / "reply").string());
}

TEST(Help, BashCompletes) {
  const io::Scratch scratch;
  scratch.put("krait.bash", krait_ok({"completion", "bash"}).out);
  EXPECT_EQ(complete(scratch, "krait gen"), "generate\n");
  EXPECT_EQ(complete(scratch, "krait generate --max"), "--max-new-tokens\n");
  EXPECT_EQ(complete(scratch, "krait generate --prompt x --top"), "--top-k --top-p\n");
  EXPECT_EQ(complete(scratch, "krait score --dtype ''"), "auto f32 bf16 f16\n");
  EXPECT_EQ(complete(scratch, "krait bench o"), "op\n");
  EXPECT_EQ(complete(scratch, "krait bench op --sh"), "--shape\n");
  EXPECT_EQ(complete(scratch, "krait generate --model ./"), "\n");  // then bash offers files
}

TEST(Help, OtherShellsHaveEveryOption) {
  const std::string zsh = krait_ok({"completion", "zsh"}).out;
  EXPECT_TRUE(zsh.starts_with("#compdef krait\n"));
  EXPECT_NE(zsh.find("'--dtype["), std::string::npos);
  const std::string fish = krait_ok({"completion", "fish"}).out;
  EXPECT_NE(fish.find("__fish_seen_subcommand_from generate' -l dtype -x -a 'auto f32 bf16 f16'"),
            std::string::npos);
  for (const std::string& command : kCommands) {
    EXPECT_NE(zsh.find("\n        " + command + ")\n"), std::string::npos) << command;
    EXPECT_NE(fish.find(" -f -a " + command + " -d "), std::string::npos) << command;
  }
}

}  // namespace
}  // namespace krait::cli
