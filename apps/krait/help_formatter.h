// How --help lays out options: names and type on the left, description and default on the right.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace krait::cli {

class HelpFormatter : public CLI::Formatter {
 public:
  HelpFormatter();
  std::string make_option_opts(const CLI::Option* option) const override;
  std::string make_option_desc(const CLI::Option* option) const override;
  std::string make_subcommand(const CLI::App* command) const override;
};

}  // namespace krait::cli
