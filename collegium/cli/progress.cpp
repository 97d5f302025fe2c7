// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/progress.h"

#include <fmt/format.h>

#include <cstdio>

#include "collegium/cli/mpirun.h"

namespace collegium::cli {

namespace {

constexpr std::chrono::seconds kLogInterval{10};

}  // namespace

Progress::Progress()
    : terminal_(stderr_is_terminal()), last_(std::chrono::steady_clock::now() - kLogInterval) {}

void Progress::show(const std::string& line, bool force) {
  const auto now = std::chrono::steady_clock::now();
  if (terminal_) {
    fmt::print(stderr, "\r{}\x1b[K", line);
    std::fflush(stderr);
    live_ = true;
  } else if (force || now - last_ >= kLogInterval) {
    fmt::print(stderr, "{}\n", line);
    last_ = now;
  }
}

void Progress::finish() {
  if (live_) fmt::print(stderr, "\n");
  live_ = false;
}

}  // namespace collegium::cli
