// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/verify.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <memory>

#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/cli/launch.h"
#include "collegium/cli/signals.h"
#include "collegium/cli/verb.h"

namespace collegium::cli {

namespace {

struct VerifyArguments {
  std::string config;
  std::vector<std::string> overrides;
  std::int64_t steps = 2;
  LaunchOptions launch;
  bool json = false;
};

void print_row(const train::VerifyRow& row, std::string& section) {
  if (section != row.section) {
    section = row.section;
    fmt::print("\n{} (bound {:.1e})\n{:>9} {:>9} {:>9} {:>9}  {:<8} layout\n", section, row.bound, "loss",
               "gradient", "weights", "norm", "verdict");
  }
  const train::Difference& d = row.difference;
  fmt::print("{:>9.1e} {:>9.1e} {:>9.1e} {:>9.1e}  {:<8} {}\n", d.loss, d.gradient, d.parameter, d.norm,
             row.passed ? "equal" : "DIFFERS", row.layout);
  if (!row.passed) {
    fmt::print("{:>48} largest: gradient {}, weight {}{}{}\n", "", d.worst_gradient, d.worst_parameter,
               row.ranks_agree ? "" : "; the ranks' copies are not the same bits",
               row.rerun_identical ? "" : "; a second run gave other bits");
  }
  std::fflush(stdout);
}

// Two nodes where the ranks allow it, so that two-level dispatch has something to cross.
int pretended_ranks_per_node(const LaunchOptions& options) {
  if (options.ranks_per_node > 0 || !options.emulate.empty()) return options.ranks_per_node;
  return options.ranks % 2 == 0 ? options.ranks / 2 : 0;
}

void run(const VerifyArguments& arguments) {
  require_config(arguments.steps >= 1, "--steps {}: must be at least 1", arguments.steps);
  require_config(arguments.overrides.empty() || !arguments.config.empty(),
                 "--set: needs a run file (--config)");
  LaunchOptions options = arguments.launch;
  options.ranks = num_ranks(options, /*otherwise=*/2);
  options.ranks_per_node = pretended_ranks_per_node(options);
  options.threads = 1;
  launch(options, [&](const std::shared_ptr<comm::Communicator>& world) {
    remove_temporary_folders_on_signals();
    const auto start = std::chrono::steady_clock::now();
    train::VerifyRequest request{.config = {}, .steps = arguments.steps, .on_row = {}};
    if (!arguments.config.empty())
      request.config = train::read_run_config(arguments.config, arguments.overrides);
    Json rows = Json::array();
    std::string section;
    std::int64_t num_rows = 0;
    request.on_row = [&](const train::VerifyRow& row) {
      ++num_rows;
      arguments.json ? rows.push_back(train::row_json(row)) : print_row(row, section);
    };
    const bool passed = train::verify(request, world);
    if (world->rank() == 0) {
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (arguments.json) {
        fmt::print("{}\n", Json{{"ranks", world->size()}, {"passed", passed}, {"rows", rows}}.dump());
      } else {
        fmt::print("\n{} comparisons with one rank on {} ranks in {}: {}\n", num_rows, world->size(),
                   format_duration(seconds), passed ? "all equal" : "DIFFERENCES FOUND");
      }
      std::fflush(stdout);
    }
    if (!passed) throw Error("verify: a layout gives other results than one rank");
  });
}

}  // namespace

void add_verify(CLI::App& app) {
  auto arguments = std::make_shared<VerifyArguments>();
  CLI::App* verb = app.add_subcommand(
      "verify", "Train a small model on one rank and under every layout of N ranks, and compare");
  verb->add_option("--config", arguments->config, "a run file instead of the built-in model and its options");
  verb->add_option("--set", arguments->overrides, "KEY=VALUE replaces a key of the run file");
  verb->add_option("--steps", arguments->steps, "optimizer steps per comparison")->capture_default_str();
  add_launch_options(*verb, arguments->launch);
  verb->add_flag("--json", arguments->json, "print one JSON object");
  verb->footer(
      "Compared are loss, every gradient, the global gradient norm and the updated weights, as ||a - b|| / "
      "||b||: in float64\n"
      "(bound 1e-11), then in the run's dtype with the one-rank run's routing replayed. Replicas must be the "
      "same bits on all\n"
      "ranks, and so must reruns. Exit code 1 when a bound is exceeded. Two ranks where neither --ranks, a "
      "launcher nor "
      "--emulate says how many.\n"
      "The others wait while rank 0 computes the one-rank run: with a large --config give a longer "
      "--timeout.\n"
      "Examples:\n"
      "  collegium verify --ranks 4\n"
      "  collegium verify --ranks 8 --backend local --ranks-per-node 2\n"
      "  collegium verify --ranks 2 --config configs/demo.toml --steps 1");
  verb->callback([arguments] { run(*arguments); });
}

}  // namespace collegium::cli
