// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/launch.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>

#include "collegium/base/error.h"
#include "collegium/base/machine.h"
#include "collegium/cli/mpirun.h"
#include "collegium/comm/emulated/emulated.h"
#include "collegium/comm/launcher.h"
#include "collegium/comm/local/local.h"
#include "collegium/comm/mpi/mpi.h"
#include "collegium/comm/seats.h"
#include "collegium/ops/threads.h"

namespace collegium::cli {

namespace {

void prepare_threads(comm::Communicator& world, const LaunchOptions& options, int default_threads) {
  const std::vector<int> cores = ops::allowed_cores();
  // Where a launcher gave every rank, or every socket, cores of its own, they are kept.
  const auto [place, count] = comm::Seats(world, cores).place_among_sharers();
  // NOLINTNEXTLINE(concurrency-mt-unsafe): nothing here changes the environment
  const bool user_chose = options.threads > 0 || std::getenv("OMP_NUM_THREADS") != nullptr;
  int threads = options.threads > 0 ? static_cast<int>(options.threads) : default_threads;
  if (!user_chose) threads = std::max(1, std::min(threads, static_cast<int>(cores.size())) / count);
  at::set_num_threads(threads);
  // OpenMP's own binding, where it is asked for, would put all ranks on the same cores. With fewer cores than
  // ranks the scheduler knows better which rank has something to do.
  if (count == 1) {
    ops::bind_threads();
  } else if (static_cast<int>(cores.size()) >= count) {
    ops::bind_threads(ops::slice_of_cores(cores, place, count));
  } else {
    ops::share_cores(cores);
  }
}

void run_rank(const std::shared_ptr<comm::Communicator>& world, const LaunchOptions& options,
              int default_threads, const RankFunction& fn) {
  prepare_threads(*world, options, default_threads);
  fn(options.emulate.empty() ? world
                             : comm::with_emulated_network(world, comm::parse_network(options.emulate)));
}

void validate(const LaunchOptions& o) {
  require_config(o.ranks >= 0, "--ranks {}: must be at least 1 (0 = the launcher's)", o.ranks);
  require_config(o.ranks <= comm::kMostRanks, "--ranks {}: must be at most {}", o.ranks, comm::kMostRanks);
  require_config(o.backend == "auto" || o.backend == "local" || o.backend == "mpi",
                 "--backend {}: must be auto, local or mpi", o.backend);
  constexpr double kYear = 365.0 * 86400.0;
  require_config(o.timeout_s > 0.0, "--timeout {}: must be positive", o.timeout_s);
  require_config(o.timeout_s <= kYear, "--timeout {}: must be at most {} s, a year", o.timeout_s, kYear);
  require_config(o.ranks_per_node >= 0, "--ranks-per-node {}: must not be negative (0 = machines)",
                 o.ranks_per_node);
  if (!o.emulate.empty()) comm::parse_network(o.emulate);
  require_threads(o.threads, "threads");
}

// Ranks that are started here share this machine, whatever they are.
void require_cores(int ranks) {
  constexpr int kMostPerCore = 64;
  require_config(ranks <= kMostPerCore * machine_cores(),
                 "ranks = {}: this machine starts at most {}, {} for each of its {} cores", ranks,
                 kMostPerCore * machine_cores(), kMostPerCore, machine_cores());
}

void require_launchers_ranks(const LaunchOptions& options, const comm::LauncherClaim& claim) {
  require_config(options.ranks == 0 || options.ranks == claim.ranks,
                 "--ranks {}: the launcher has started {} ({} = {}); leave --ranks out", options.ranks,
                 claim.ranks, claim.variable, claim.ranks);
  require_config(options.backend != "local" || claim.ranks == 1,
                 "--backend local: the launcher has started {} ranks as processes ({}); leave --backend out",
                 claim.ranks, claim.variable);
}

std::chrono::milliseconds timeout_of(const LaunchOptions& options) {
  return std::chrono::milliseconds(std::max(1L, std::lround(options.timeout_s * 1000.0)));
}

// The mpirun to start ranks with; empty: ranks are threads.
std::string choose_mpirun(const LaunchOptions& options) {
  if (options.backend == "local") return "";
  const std::string mpirun = comm::has_mpi() ? find_mpirun() : "";
  if (options.backend == "auto") return mpirun;
  require_config(comm::has_mpi(),
                 "--backend mpi: this build has no MPI; use --backend local, or build where ./dev setup has "
                 "installed Open MPI");
  require_config(!mpirun.empty(),
                 "--backend mpi: no mpirun beside the program or on PATH; use --backend local");
  return mpirun;
}

}  // namespace

void add_launch_options(CLI::App& verb, LaunchOptions& options) {
  const auto group = [](CLI::Option* option) { option->group("Ranks")->capture_default_str(); };
  group(verb.add_option(
      "--ranks", options.ranks,
      "ranks to start on this machine; 0 = those of mpirun or srun, else of --emulate, else 1"));
  group(verb.add_option("--backend", options.backend,
                        "auto, local (ranks are threads) or mpi (ranks are processes)"));
  group(verb.add_option("--timeout", options.timeout_s,
                        "seconds; a rank that waits longer for others fails and names them"));
  group(verb.add_option("--ranks-per-node", options.ranks_per_node,
                        "pretend that this many ranks share a node; 0 = nodes are machines"));
  verb.add_option("--emulate", options.emulate,
                  "wait as long as this network would: nodes=2x2,intra=300GB/s:2us,inter=50GB/s:10us,scale=8")
      ->group("Ranks");
}

int num_ranks(const LaunchOptions& options, int otherwise) {
  validate(options);
  if (const std::optional<comm::LauncherClaim> claim = comm::find_launcher()) {
    require_launchers_ranks(options, *claim);
    return claim->ranks;
  }
  if (options.ranks > 0) return options.ranks;
  if (options.emulate.empty()) return otherwise;
  const comm::Network network = comm::parse_network(options.emulate);
  return network.nodes * network.ranks_per_node;
}

void launch(const LaunchOptions& options, const RankFunction& fn) {
  const int count = num_ranks(options);
  const int default_threads = at::get_num_threads();
  const RankFunction rank = [&](const std::shared_ptr<comm::Communicator>& world) {
    run_rank(world, options, default_threads, fn);
  };
  if (count == 1) return rank(comm::single_rank_world());
  if (comm::find_launcher()) {
    comm::run_mpi_world([&](comm::Communicator& world) { rank(world.shared_from_this()); },
                        {.timeout = timeout_of(options),
                         .ranks_per_node = options.ranks_per_node,
                         .cores = ops::allowed_cores()});
    return;
  }
  require_cores(count);
  const std::string mpirun = choose_mpirun(options);
  if (!mpirun.empty()) {
    ops::unbind_thread();
    return run_with_mpirun(mpirun, count);
  }
  comm::run_ranks(count, [&](comm::Communicator& world) { rank(world.shared_from_this()); },
                  {.timeout = timeout_of(options), .ranks_per_node = options.ranks_per_node});
}

}  // namespace collegium::cli
