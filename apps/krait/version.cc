#include "version.h"

#include <hwy/highway.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <sstream>
#include <string_view>
#include <vector>

#include "core/thread_pool.h"
#include "krait/core/context.h"
#include "krait/core/error.h"
#ifdef KRAIT_ONEDNN
#include <oneapi/dnnl/dnnl.h>
#endif

namespace krait::cli {
namespace {

struct Processor {
  std::string name = "unknown processor";
  std::string features;
};

// From the kernel, which lists only what it lets programs use.
Processor processor() {
  static constexpr std::array<std::string_view, 20> interesting = {
      "sse4_1",   "sse4_2",   "avx",      "avx2",        "fma",         "f16c",        "avx512f",
      "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
      "amx_tile", "amx_bf16", "asimd",    "asimdhp",     "bf16",        "sve"};
  Processor found;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.empty()) break;  // the first processor stands for all
    const auto colon = line.find(": ");
    if (colon == std::string::npos) continue;
    const std::string value = line.substr(colon + 2);
    if (line.starts_with("model name")) found.name = value;
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    std::istringstream words(value);
    for (std::string word; words >> word;)
      if (std::ranges::find(interesting, word) != interesting.end()) found.features += " " + word;
  }
  return found;
}

std::string built_targets() {
  std::string names;
  for (std::uint64_t left = static_cast<std::uint64_t>(HWY_TARGETS); left != 0; left &= left - 1)
    names += concat(" ", hwy::TargetName(static_cast<std::int64_t>(left & (~left + 1))));
  return names;
}

std::string compiler() {
#if defined(__clang__)
  return concat("clang ", __clang_major__, ".", __clang_minor__, ".", __clang_patchlevel__);
#else
  return concat("gcc ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#endif
}

std::string products() {
#ifdef KRAIT_ONEDNN
  const dnnl_version_t* version = dnnl_version();
  return concat("oneDNN ", version->major, ".", version->minor, ".", version->patch);
#else
  return "built without oneDNN";
#endif
}

}  // namespace

std::string version_text() {
  const Processor cpu = processor();
  return concat("krait ", KRAIT_VERSION, "\n",                                                //
                "compiler   ", compiler(), "\n",                                              //
                "processor  ", cpu.name, ", ", available_processors(), " threads\n",          //
                "features  ", cpu.features, "\n",                                             //
                "backends   cpu: Highway ", HWY_MAJOR, ".", HWY_MINOR, ".", HWY_PATCH, " (",  //
                simd_target(), " of", built_targets(), "), ", products());
}

}  // namespace krait::cli
