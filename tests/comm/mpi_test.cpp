// SPDX-License-Identifier: Apache-2.0
// One rank of an MPI world: `mpirun -n N comm_mpi_test CASE`. Exit code 0 when what CASE expects happened on
// this rank.
#include "collegium/comm/mpi/mpi.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <csignal>
#include <thread>

#include "collegium/comm/ledger.h"
#include "tests/comm/verb_cases.h"

namespace {

using namespace collegium;        // NOLINT(google-build-using-namespace): the body of a test program
using namespace collegium::comm;  // NOLINT(google-build-using-namespace)

// More than the scratch memory of a reduction holds, cut so that slices end within parts. Sums are exact.
void long_tensors_are_reduced_in_parts(Communicator& comm) {
  const std::int64_t size = comm.size();
  const at::Tensor ramp = at::arange(std::int64_t{5} * 1024 * 1024 + 3, at::kDouble).remainder(1009);
  const at::Tensor expected = ramp * size + static_cast<double>(size * (size - 1) / 2);
  const at::Tensor summed = ramp + comm.rank();
  comm.all_reduce(summed).wait();
  EXPECT_TRUE(at::equal(summed, expected));

  // Rank r's slice has r shares of rows: none on rank 0, where there is more than one rank.
  const std::int64_t shares = size == 1 ? 1 : size * (size - 1) / 2;
  const std::int64_t share = ramp.numel() / 3 / shares;
  std::vector<std::int64_t> rows;
  std::int64_t begin = 0;
  for (std::int64_t r = 0; r < size; ++r) {
    rows.push_back(size == 1 ? share : r * share);
    if (r < comm.rank()) begin += rows.back();
  }
  const at::Tensor input = (ramp + comm.rank()).narrow(0, 0, 3 * shares * share).view({-1, 3});
  const std::int64_t own = rows[static_cast<std::size_t>(comm.rank())];
  const at::Tensor output = at::full({own, 3}, -1.0, at::kDouble);
  comm.reduce_scatter(input, output, ReduceOp::kSum, rows).wait();
  EXPECT_TRUE(at::equal(output, expected.narrow(0, 3 * begin, 3 * own).view({-1, 3})));
}

// Who posts an operation moves on those that are under way: nobody waits for this sum or looks whether it is
// through. Each of its stages needs that the other ranks have begun theirs.
void later_operations_advance_earlier_ones(Communicator& comm) {
  comm.barrier();
  const at::Tensor sum = at::ones({64 * 1024}, at::kDouble);
  Work work = comm.all_reduce(sum);
  std::vector<Work> later;
  const at::Tensor small = at::ones({8});
  for (int i = 0; i < 60; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    later.push_back(comm.all_reduce(small.clone()));
  }
  EXPECT_NE(work.timeline().done, Clock::time_point{});
  work.wait();
  EXPECT_TRUE(at::equal(sum, at::full({64 * 1024}, static_cast<double>(comm.size()), at::kDouble)));
  for (Work& other : later) other.wait();
}

void run_verbs(Communicator& comm) {
  for (const VerbCase& verb : verb_cases()) {
    const WhereScope scope(comm.where(), {.phase = verb.name});
    verb.body(comm);
  }
  long_tensors_are_reduced_in_parts(comm);
  later_operations_advance_earlier_ones(comm);
}

// One rank stops answering; the others time out. None but the first has an element to reduce, yet all name
// the rank that is missing.
void stop_answering(Communicator& comm) {
  comm.where() = {.step = 1, .layer = 3, .phase = "dispatch"};
  if (comm.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(60));
  comm.all_reduce(at::ones({1})).wait();
}

// Rank 2 waits for rank 1, which has stopped, and rank 0 for rank 2: rank 2, which knows more, reports.
void stop_one_of_a_chain(Communicator& comm) {
  const auto last_two = comm.split(comm.rank() > 0 ? 0 : -1, comm.rank(), "last");
  const auto others = comm.split(comm.rank() != 1 ? 0 : -1, comm.rank(), "others");
  if (comm.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(60));
  if (comm.rank() == 2) last_two->barrier();
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  others->barrier();
}

// Nobody has a row for anybody, and yet the missing rank is missed here, not at the next collective.
void exchange_nothing(Communicator& comm) {
  if (comm.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(60));
  const at::Tensor nothing = at::ones({0, 4});
  const std::vector<std::int64_t> rows(static_cast<std::size_t>(comm.size()), 0);
  comm.all_to_all(nothing, nothing.clone(), rows, rows).wait();
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

std::shared_ptr<Communicator> checked(Communicator& comm) {
  return with_ledger(comm.shared_from_this(), std::make_shared<Ledger>(), {.check = true});
}

// Of as many bytes, which MPI alone takes for the same.
void disagree_on_dtypes(Communicator& comm) {
  const WhereScope scope(comm.where(), {.step = 1, .layer = 3, .phase = "dispatch"});
  checked(comm)->broadcast(at::ones({10}, comm.rank() == 0 ? at::kFloat : at::kInt), 0).wait();
}

void disagree_on_message_dtypes(Communicator& comm) {
  const auto compared = checked(comm);
  if (comm.rank() == 0) compared->send(at::ones({3}, at::kInt), 1).wait();
  if (comm.rank() == 1) compared->recv(at::ones({3}), 0).wait();
}

void stop_before_a_comparison(Communicator& comm) {
  const auto compared = checked(comm);
  const WhereScope scope(comm.where(), {.step = 1, .layer = 3, .phase = "dispatch"});
  if (comm.rank() == 1) std::this_thread::sleep_for(std::chrono::seconds(30));
  compared->all_reduce(at::ones({10})).wait();
}

void leave_a_message_open(Communicator& comm) {
  if (comm.rank() == 1) const Work dropped = comm.recv(at::ones({3}), 0);
}

// Far beyond the scratch memory of a reduction, by a whole number of its parts.
void disagree_on_lengths(Communicator& comm) {
  const std::int64_t mebibyte = 1024 * 1024;
  comm.all_reduce(at::ones({16 * (1 + comm.rank()) * mebibyte})).wait();
}

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  at::set_num_threads(1);
  const std::string name = argc > 1 ? argv[1] : "verbs";
  const auto body = name == "stop"       ? stop_answering
                    : name == "chain"    ? stop_one_of_a_chain
                    : name == "fail"     ? fail_on_one_rank
                    : name == "killed"   ? be_killed
                    : name == "disagree" ? disagree_on_sizes
                    : name == "lengths"  ? disagree_on_lengths
                    : name == "dtypes"   ? disagree_on_dtypes
                    : name == "open"     ? leave_a_message_open
                    : name == "messages" ? disagree_on_message_dtypes
                    : name == "compared" ? stop_before_a_comparison
                    : name == "nothing"  ? exchange_nothing
                                         : run_verbs;
  MpiOptions options;
  options.timeout = std::chrono::milliseconds(name == "verbs" ? 60000 : 1500);
  try {
    run_mpi_world(body, options);
  } catch (const std::exception& error) {
    fmt::print("{}\n", error.what());
    std::fflush(stdout);
    abort_mpi_world(3);
  }
  return testing::Test::HasFailure() ? 1 : 0;
}
