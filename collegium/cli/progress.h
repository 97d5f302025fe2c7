// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <string>

namespace collegium::cli {

/// What     Progress on standard error: one live line on a terminal, a plain line every few seconds in a log.
class Progress {
 public:
  Progress();
  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// Shows the line now (terminal) or if the last was long enough ago (log); `force` shows it in a log
  /// always.
  void show(const std::string& line, bool force = false);
  /// Ends the live line, so that other output starts on a line of its own.
  void finish();

 private:
  int columns_;  // of the terminal; 0 = a log
  bool live_ = false;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace collegium::cli
