// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/progress.h"

#include <fmt/format.h>

#include <cstdio>

#include "collegium/cli/mpirun.h"

namespace collegium::cli {

namespace {

constexpr std::chrono::seconds kLogInterval{10};

}  // namespace

Progress::Progress() : columns_(terminal_columns()), last_(std::chrono::steady_clock::now() - kLogInterval) {}

void Progress::show(const std::string& line, bool force) {
  const auto now = std::chrono::steady_clock::now();
  if (columns_ > 0) {
    // A longer one would go on in the next row, which the next line would not overwrite.
    fmt::print(stderr, "\r{}\x1b[K", line.substr(0, static_cast<std::size_t>(columns_ - 1)));
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
