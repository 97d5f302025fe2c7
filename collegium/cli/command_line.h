// SPDX-License-Identifier: Apache-2.0
#pragma once

// What both programs do with their command lines beside CLI11.

#include <cstddef>
#include <string>
#include <vector>

#include "collegium/cli/app.h"

namespace collegium::cli {

inline constexpr const char* kVersion = "0.1.0";

/// What     Rules for all options of all verbs: a value is not empty, as that of a shell's variable that is
///          not set, which would be taken for an option that was not given; and one that may be repeated
///          takes one value each time, not all words that follow.
void finish_options(CLI::App& app);

/// What     Refuses a verb that is not there and names the nearest; CLI11 would only say that an argument was
///          not expected. `place` is where the verb stands in `arguments`.
/// Throws   ConfigError.
void require_known_verb(const CLI::App& app, const std::vector<std::string>& arguments,
                        std::size_t place = 1);

/// What     Brings what was printed to standard output: it may wait in a buffer, and the disk that it goes to
///          may be full.
/// Throws   Error with the system's reason.
void require_written();

}  // namespace collegium::cli
