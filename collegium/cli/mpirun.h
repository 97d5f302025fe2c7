// SPDX-License-Identifier: Apache-2.0
#pragma once

// Ranks that are processes of this machine: mpirun starts this program again, and what the ranks have to say
// about a failure comes back as one message.

#include <exception>
#include <string>
#include <utility>
#include <vector>

namespace collegium::cli {

/// Ranks that this program started have failed.
class RanksFailed : public std::exception {
 public:
  RanksFailed(std::string message, int exit_code) : message_(std::move(message)), exit_code_(exit_code) {}
  const char* what() const noexcept override { return message_.c_str(); }
  int exit_code() const { return exit_code_; }

 private:
  std::string message_;
  int exit_code_;
};

/// What     The mpirun of the MPI that this program was built with: where it was at that time, beside the
///          binary (a folder above it holds .venv), or on PATH. Empty when there is none.
std::string find_mpirun();

/// What     Runs this program's command line as `num_ranks` processes, output passed through. The first
///          SIGINT, SIGTERM or SIGHUP asks the ranks to stop (they get SIGUSR1), the second ends them.
/// Throws   RanksFailed: the first report of a rank, or which signal ended which rank.
void run_with_mpirun(const std::string& mpirun, int num_ranks);

/// What     The arguments of this program, the name first. A rank that run_with_mpirun() started has those of
///          the program that started it: mpirun would take some of them for its own.
std::vector<std::string> program_arguments(int argc, char** argv);

/// What     In a rank that run_with_mpirun() started: hands the error to the program that started it, which
///          prints the first it gets. Returns false in any other program.
bool report_to_starter(const std::string& message, int exit_code);

/// What     Columns of the terminal that standard error is, 0 where it is none; in a rank that
///          run_with_mpirun() started, of that program's.
int terminal_columns();

}  // namespace collegium::cli
