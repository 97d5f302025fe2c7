// SPDX-License-Identifier: Apache-2.0
#pragma once

// The errors of the whole project. Libraries throw; only cli/main.cpp turns an exception into an exit code.

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace collegium {

/// Something failed while the program did what it was asked to do (exit code 1).
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The user asked for something impossible: configuration, command line, or input files (exit code 2).
/// The message names the field (or file), its value, the rule and the other number.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// An invariant of the program does not hold: a bug here, not a mistake of the user (exit code 1).
class InternalError : public Error {
 public:
  using Error::Error;
};

namespace internal {
[[noreturn]] void throw_check_failure(const char* file, int line, const char* condition,
                                      const std::string& detail);
}  // namespace internal

/// Throws ConfigError with a fmt-formatted message when `ok` is false.
template <typename... Args>
void require_config(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) throw ConfigError(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace collegium

/// Invariant, always on: COLLEGIUM_CHECK(condition, "format {}", values...).
#define COLLEGIUM_CHECK(condition, ...)                                          \
  do {                                                                           \
    if (!(condition)) [[unlikely]] {                                             \
      ::collegium::internal::throw_check_failure(__FILE__, __LINE__, #condition, \
                                                 ::fmt::format(__VA_ARGS__));    \
    }                                                                            \
  } while (false)
