// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/mpirun_output.h"

#include <algorithm>
#include <regex>

namespace collegium::cli {

namespace {

// Open MPI frames its notices with lines of 74 dashes.
const std::string& frame() {
  static const std::string dashes(74, '-');
  return dashes;
}

// Ends a live line of progress, which is not followed by a line break.
constexpr std::string_view kEndOfLiveLine = "\x1b[K";

// Written by the event library when mpirun ends ranks while it still reads their output.
constexpr std::string_view kWarning = "[warn] Epoll ";

bool may_be_kept(std::string_view line) {
  const auto begins = [&](std::string_view whole) {
    const std::size_t length = std::min(line.size(), whole.size());
    return line.substr(0, length) == whole.substr(0, length);
  };
  return (line.size() <= frame().size() && begins(frame())) || begins(kWarning);
}

}  // namespace

void MpirunOutput::end_line(std::string& shown) {
  if (line_ == frame()) {
    in_notice_ = !in_notice_;
  } else if (in_notice_) {
    notices_ += line_ + "\n";
  } else if (!line_.starts_with(kWarning)) {
    shown += line_ + "\n";
  }
  line_.clear();
}

std::string MpirunOutput::pass(std::string_view text) {
  std::string shown;
  for (const char c : text) {
    if (c == '\0') continue;
    if (line_shown_) {
      shown.push_back(c);
      line_shown_ = c != '\n' && !shown.ends_with(kEndOfLiveLine);
    } else if (c == '\n') {
      end_line(shown);
    } else {
      line_.push_back(c);
      if (in_notice_ || may_be_kept(line_)) continue;
      shown += line_;
      line_.clear();
      line_shown_ = true;
    }
  }
  return shown;
}

std::string MpirunOutput::finish() {
  std::string shown;
  if (!line_.empty()) end_line(shown);
  return shown;
}

std::optional<EndedBySignal> MpirunOutput::ended_by_signal() const {
  static const std::regex pattern(
      R"(rank\s+(\d+)\s+with\s+PID\s+\d+\s+on\s+node\s+\S+\s+exited\s+on\s+signal\s+(\d+)\s+\(([^)]*)\))");
  std::smatch match;
  if (!std::regex_search(notices_, match, pattern)) return std::nullopt;
  return EndedBySignal{.rank = std::stoi(match[1]), .signal = std::stoi(match[2]), .name = match[3]};
}

}  // namespace collegium::cli
