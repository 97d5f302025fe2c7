// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/command_line.h"

#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/base/fields.h"

namespace collegium::cli {

namespace {

void finish_options(CLI::App& app) {
  const auto not_empty = [](const std::string& value) {
    return value.empty() ? std::string("is empty: give a value, or leave the option out") : std::string();
  };
  for (CLI::Option* option : app.get_options()) {
    if (option->get_items_expected_max() == 0) continue;
    option->check(CLI::Validator(not_empty, ""));
    if (!option->get_positional()) option->allow_extra_args(false);
  }
  for (CLI::App* verb : app.get_subcommands({})) finish_options(*verb);
}

// CLI11 would only say that an argument was not expected. `place` is where the verb stands.
void require_known_verb(const CLI::App& app, const std::vector<std::string>& arguments,
                        std::size_t place = 1) {
  if (arguments.size() <= place || arguments[place].starts_with('-')) return;
  std::vector<std::string> verbs;
  for (const CLI::App* verb : app.get_subcommands({})) {
    if (verb->get_name() == arguments[place]) {
      if (!verb->get_subcommands({}).empty()) require_known_verb(*verb, arguments, place + 1);
      return;
    }
    verbs.push_back(verb->get_name());
  }
  const auto nearest = nearest_name(arguments[place], verbs);
  throw ConfigError(fmt::format("no verb '{}'; {}", arguments[place],
                                nearest ? fmt::format("did you mean '{}'?", *nearest)
                                        : fmt::format("there are: {}", fmt::join(verbs, ", "))));
}

}  // namespace

void run_verb(CLI::App& app, std::vector<std::string> arguments, const std::function<void()>& before_help) {
  finish_options(app);
  require_known_verb(app, arguments);
  // CLI11 takes them without the name, the last first.
  std::reverse(arguments.begin(), arguments.end());
  arguments.pop_back();
  try {
    app.parse(std::move(arguments));
  } catch (const CLI::Success& shown) {
    if (before_help) before_help();
    app.exit(shown);
  }
  // What was printed may wait in a buffer, and the disk that it goes to may be full.
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) throw_not_written(errno);
}

void throw_not_written(int error) {
  // NOLINTNEXTLINE(concurrency-mt-unsafe): at the end, one thread
  throw Error(fmt::format("cannot write to standard output: {}", std::strerror(error)));
}

}  // namespace collegium::cli
