// SPDX-License-Identifier: Apache-2.0
// One rank of an MPI world: `mpirun -n N comm_mpi_test CASE`. Exit code 0 when what CASE expects happened on
// this rank.
#include "collegium/comm/mpi/mpi.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/ones.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <csignal>
#include <thread>

#include "tests/comm/verb_cases.h"

namespace {

using namespace collegium;        // NOLINT(google-build-using-namespace): the body of a test program
using namespace collegium::comm;  // NOLINT(google-build-using-namespace)

void run_verbs(Communicator& comm) {
  for (const VerbCase& verb : verb_cases()) {
    const WhereScope scope(comm.where(), {.phase = verb.name});
    verb.body(comm);
  }
}

// One rank stops answering; the others time out and one of them reports.
void stop_answering(Communicator& comm) {
  comm.where() = {.step = 1, .layer = 3, .phase = "dispatch"};
  if (comm.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(60));
  comm.all_reduce(at::ones({10})).wait();
}

void fail_on_one_rank(Communicator& comm) {
  if (comm.rank() == 1) throw ConfigError("the shard is corrupt");
  comm.barrier();
}

void be_killed(Communicator& comm) {
  if (comm.rank() == 1) std::raise(SIGKILL);
  comm.barrier();
}

void disagree_on_sizes(Communicator& comm) { comm.broadcast(at::ones({10 + comm.rank()}), 0).wait(); }

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  at::set_num_threads(1);
  const std::string name = argc > 1 ? argv[1] : "verbs";
  const auto body = name == "stop"       ? stop_answering
                    : name == "fail"     ? fail_on_one_rank
                    : name == "killed"   ? be_killed
                    : name == "disagree" ? disagree_on_sizes
                                         : run_verbs;
  MpiOptions options;
  options.timeout = std::chrono::milliseconds(name == "verbs" || name == "progress" ? 60000 : 1500);
  if (name == "progress") options.progress_interval = std::chrono::microseconds(100);
  try {
    run_mpi_world(body, options);
  } catch (const std::exception& error) {
    fmt::print("{}\n", error.what());
    std::fflush(stdout);
    abort_mpi_world(3);
  }
  return testing::Test::HasFailure() ? 1 : 0;
}
