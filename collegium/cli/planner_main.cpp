// SPDX-License-Identifier: Apache-2.0
// The planner's verbs alone, without libtorch: builds in minutes (COLLEGIUM_PLANNER_ONLY) and runs where
// nothing else of the project does.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "collegium/base/error.h"
#include "collegium/cli/command_line.h"
#include "collegium/cli/verb.h"

int main(int argc, char** argv) {
  constexpr int kFailed = 1;
  constexpr int kWrongUsage = 2;
  CLI::App app("The planner of Collegium: what fits, how fast, and why.", "collegium_planner");
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  app.set_version_flag("--version", fmt::format("collegium_planner {}", collegium::cli::kVersion));
  collegium::cli::add_plan(app);
  collegium::cli::add_simulate(app);
  try {
    collegium::cli::run_verb(app, {argv, argv + argc});
    return 0;
  } catch (const CLI::ParseError& error) {
    app.exit(error);
    return kWrongUsage;
  } catch (const collegium::ConfigError& error) {
    fmt::print(stderr, "collegium: {}\n", error.what());
    return kWrongUsage;
  } catch (const std::exception& error) {
    fmt::print(stderr, "collegium: {}\n", error.what());
    return kFailed;
  }
}
