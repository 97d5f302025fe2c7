// SPDX-License-Identifier: Apache-2.0
#pragma once

// What mpirun writes to standard error, where the ranks' own lines come through too: mpirun's notices are
// blocks between two lines of dashes.

#include <optional>
#include <string>
#include <string_view>

namespace collegium::cli {

/// A rank that a signal ended, as mpirun noticed it.
struct EndedBySignal {
  int rank = 0;
  int signal = 0;
  std::string name;  ///< "Killed"
};

/// Keeps the notices back and passes everything else on as it comes.
class MpirunOutput {
 public:
  /// What     The part of `text` (and of what was kept before) that is to be shown now.
  std::string pass(std::string_view text);
  /// What     What is left when mpirun has ended.
  std::string finish();

  const std::string& notices() const { return notices_; }
  std::optional<EndedBySignal> ended_by_signal() const;

 private:
  void end_line(std::string& shown);

  std::string line_;         ///< the current line, as long as it may be one to keep back
  bool line_shown_ = false;  ///< its beginning was passed on already
  bool in_notice_ = false;
  std::string notices_;
};

}  // namespace collegium::cli
