// SPDX-License-Identifier: Apache-2.0
#pragma once

// What both programs do with their command lines beside CLI11.

#include <functional>
#include <string>
#include <vector>

#include "collegium/cli/app.h"

namespace collegium::cli {

inline constexpr const char* kVersion = "0.1.0";

/// What     Runs the verb that the command line names, the program's name first, or shows help or the
///          version, after `before_help`. Rules for all options: a value is not empty, as that of a shell's
///          variable that is not set, which would be taken for an option that was not given; and one that
///          may be repeated takes one value each time, not all words that follow.
/// Throws   ConfigError: there is no such verb, the nearest is named. CLI::ParseError. Error: standard output
///          cannot be written. What the verb throws.
void run_verb(CLI::App& app, std::vector<std::string> arguments,
              const std::function<void()>& before_help = {});

/// Throws Error: standard output cannot be written, with the system's reason for it.
[[noreturn]] void throw_not_written(int error);

}  // namespace collegium::cli
