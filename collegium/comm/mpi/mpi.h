// SPDX-License-Identifier: Apache-2.0
#pragma once

// Ranks are processes, started by mpirun or srun. Everything is non-blocking point-to-point messages, so that
// a time-out can say who is missing and reductions add in rank order. Bytes of a reduction: as call.h says.

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "collegium/comm/communicator.h"

namespace collegium::comm {

struct MpiOptions {
  std::chrono::milliseconds timeout{
      300000};             ///< a wait longer than this is an error naming the missing ranks
  int ranks_per_node = 0;  ///< 0: nodes are machines; n: ranks [0, n) are node 0, and so on
  /// That this rank may run on; empty: all of its machine. Where the ranks of a machine are more than the
  /// cores of all of them, a rank that waits leaves its core to the others.
  std::vector<int> cores;
};

/// Whether this build has MPI.
bool has_mpi();

/// What     Joins the MPI world that the launcher made (one rank when there was none) and runs fn in it.
///          Once per process.
/// Throws   What fn throws, with "rank R of N: " in front, ConfigError staying ConfigError. Ranks throw one
///          after the other, rank 0 first, so that a caller that reports and calls abort_mpi_world() at once
///          reports for all; after a time-out in no order of ranks, who misses the fewest ranks first.
///          ConfigError: no MPI in this build, or a launcher of another MPI.
void run_mpi_world(const std::function<void(Communicator&)>& fn, const MpiOptions& options = {});

/// What     Ends all ranks of the MPI world with this exit code. For the program's main after a failure of
///          run_mpi_world().
[[noreturn]] void abort_mpi_world(int exit_code);

}  // namespace collegium::comm
