// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <csignal>
#include <map>
#include <string>

#include "collegium/cli/mpirun_output.h"
#include "collegium/cli/signals.h"
#include "collegium/comm/launcher.h"
#include "collegium/ops/threads.h"

namespace collegium {

namespace {

const std::string& frame() {
  static const std::string line = std::string(74, '-') + "\n";
  return line;
}

// What is shown when `text` arrives in pieces of `size` bytes.
std::string shown_in_pieces(cli::MpirunOutput& output, const std::string& text, std::size_t size) {
  std::string shown;
  for (std::size_t begin = 0; begin < text.size(); begin += size)
    shown += output.pass(text.substr(begin, size));
  return shown + output.finish();
}

std::optional<comm::LauncherClaim> claim_of(const std::map<std::string, std::string>& environment) {
  return comm::find_launcher([&](const char* name) {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

}  // namespace

TEST(MpirunOutput, notices_are_kept_and_everything_else_passes) {
  const std::string text = "step 1\n" + frame() +
                           "prterun noticed that process rank 2 with PID 7 on node vm exited on\n"
                           "signal 9 (Killed).\n" +
                           frame() + "[warn] Epoll MOD(1) on fd 21 failed.\n--- a line of three\nrest";
  for (const std::size_t size : {std::size_t{1}, std::size_t{7}, text.size()}) {
    cli::MpirunOutput output;
    EXPECT_EQ(shown_in_pieces(output, text, size), "step 1\n--- a line of three\nrest");
    const auto ended = output.ended_by_signal();
    ASSERT_TRUE(ended.has_value());
    EXPECT_EQ(ended->rank, 2);
    EXPECT_EQ(ended->signal, 9);
    EXPECT_EQ(ended->name, "Killed");
  }
}

TEST(MpirunOutput, a_notice_after_a_live_line_is_kept) {
  cli::MpirunOutput output;
  EXPECT_EQ(output.pass("\rstep 1\x1b[K"), "\rstep 1\x1b[K");
  EXPECT_EQ(output.pass(frame() + "MPI_ABORT was invoked\n" + frame()), "");
  EXPECT_EQ(output.notices(), "MPI_ABORT was invoked\n");
  EXPECT_FALSE(output.ended_by_signal().has_value());
}

TEST(Launcher, of_slurm_only_a_step_counts) {
  EXPECT_FALSE(claim_of({}).has_value());
  EXPECT_FALSE(claim_of({{"SLURM_NTASKS", "4"}, {"SLURM_PROCID", "0"}}).has_value());
  EXPECT_FALSE(claim_of({{"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_PROCID", "0"}}).has_value());
  const auto claim = claim_of({{"SLURM_STEP_NUM_TASKS", "4"}, {"SLURM_PROCID", "3"}});
  ASSERT_TRUE(claim.has_value());
  EXPECT_EQ(claim->ranks, 4);
  EXPECT_EQ(claim->rank, 3);
}

TEST(Launcher, open_mpi_counts_with_one_rank_too_and_is_not_refused) {
  const auto claim = claim_of({{"OMPI_COMM_WORLD_SIZE", "1"}, {"OMPI_COMM_WORLD_RANK", "0"}});
  ASSERT_TRUE(claim.has_value());
  EXPECT_EQ(claim->ranks, 1);
  EXPECT_NO_THROW(comm::refuse_foreign_launcher(1, claim));
}

// A request to stop interrupts no read or write.
TEST(Signals, ask_to_stop_and_let_system_calls_go_on) {
  cli::install_stop_signals();
  struct sigaction action{};
  ASSERT_EQ(::sigaction(SIGUSR1, nullptr, &action), 0);
  EXPECT_NE(action.sa_flags & SA_RESTART, 0);
  EXPECT_FALSE(cli::stop_requested());
  std::raise(SIGUSR1);
  EXPECT_TRUE(cli::stop_requested());
}

// 5 cores for 2 ranks: 0 2 | 4 6 7.
TEST(Threads, slices_of_cores_are_disjoint_and_whole) {
  const std::vector<int> cores = {0, 2, 4, 6, 7};
  EXPECT_EQ(ops::slice_of_cores(cores, 0, 2), (std::vector<int>{0, 2}));
  EXPECT_EQ(ops::slice_of_cores(cores, 1, 2), (std::vector<int>{4, 6, 7}));
  EXPECT_EQ(ops::slice_of_cores(cores, 4, 5), (std::vector<int>{7}));
  EXPECT_EQ(ops::slice_of_cores(cores, 3, 6), cores);
}

}  // namespace collegium
