// SPDX-License-Identifier: Apache-2.0
#pragma once

// Ranks are threads of one process: no MPI needed, and a debugger or sanitizer sees all of them. Data moves
// by one copy from the sender's tensor to the receiver's, done by whichever ranks are waiting at that moment:
// no thread besides the ranks', and a rank that computes is not needed by those that wait.
//
// The ranks' calls meet in shared memory, so operation, dtype, sizes and order are always compared, and a
// disagreement is an error on all ranks before any byte is moved.

#include <chrono>
#include <functional>
#include <memory>

#include "collegium/comm/communicator.h"

namespace collegium::comm {

struct LocalOptions {
  std::chrono::milliseconds timeout{
      300000};             ///< a wait longer than this is an error naming the missing ranks
  int ranks_per_node = 0;  ///< ranks [0, n) are node 0, [n, 2n) node 1, ...; 0 = one node
};

/// What     Runs fn(world) on `num_ranks` threads, each with its own communicator, and returns when all are
///          done. When one rank throws, or returns while others wait for it, the waits of all others end at
///          once.
/// Throws   The first failure only, with "rank R of N: " in front; ConfigError stays ConfigError, CommError
///          CommError. ConfigError when the system has no thread for a rank. A rank that has not come back
///          `timeout` after the failure is left running and named in the message; what `fn` refers to must
///          then stay alive, so the caller should end the process soon.
void run_ranks(int num_ranks, const std::function<void(Communicator&)>& fn, const LocalOptions& options = {});

/// What     A world of one rank: every verb is a copy at most. For code that asks for a communicator and
///          runs alone.
std::shared_ptr<Communicator> single_rank_world();

}  // namespace collegium::comm
