// SPDX-License-Identifier: Apache-2.0
#pragma once

// One verb on several ranks: joins the world of a launcher (mpirun, srun), or makes one on this machine.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "collegium/cli/app.h"
#include "collegium/comm/communicator.h"

namespace collegium::cli {

struct LaunchOptions {
  int ranks = 0;                 ///< 0 = those of the launcher, else those of `emulate`, else one
  std::string backend = "auto";  ///< auto, local (ranks are threads) or mpi (ranks are processes)
  double timeout_s = 300.0;      ///< a rank that waits longer than this for others fails and names them
  int ranks_per_node = 0;        ///< pretend that this many ranks share a node; 0 = nodes are machines
  std::string emulate;           ///< a network as comm::parse_network() reads it, or empty
  std::int64_t threads = 0;  ///< OpenMP threads of a rank; 0 = OMP_NUM_THREADS, else its share of the cores
};

/// What     --ranks, --backend, --timeout, --ranks-per-node and --emulate.
void add_launch_options(CLI::App& verb, LaunchOptions& options);

/// What     How many ranks launch() runs: those of the launcher, else of --ranks, else of --emulate, else
///          `otherwise`.
/// Throws   ConfigError as launch().
int num_ranks(const LaunchOptions& options, int otherwise = 1);

using RankFunction = std::function<void(const std::shared_ptr<comm::Communicator>& world)>;

/// What     Runs fn on every rank and returns when all have ended. A program that a launcher started is one
///          rank of the launcher's world. Otherwise ranks are this machine's: one is this thread; several are
///          threads of this process, or processes that mpirun starts with this program's command line. In the
///          latter case fn runs in those processes and not in this one, so nothing should follow launch().
///          Before fn is called its thread has its number of OpenMP threads, bound to its own cores where
///          there are enough (docs/launch.md).
/// Throws   What fn throws on the first rank that fails; RanksFailed for ranks that are other processes.
///          ConfigError: an option that cannot be, a number of ranks that contradicts the launcher's, no MPI
///          in this build, a launcher of another MPI.
void launch(const LaunchOptions& options, const RankFunction& fn);

}  // namespace collegium::cli
