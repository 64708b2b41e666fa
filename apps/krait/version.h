#pragma once

#include <string>

namespace krait::cli {

// What `krait --version` prints: version, compiler, processor and its instruction sets, backends built in.
std::string version_text();

}  // namespace krait::cli
