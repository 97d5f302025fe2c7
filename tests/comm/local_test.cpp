// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/local/local.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <thread>

#include "collegium/comm/shared_memory.h"
#include "tests/comm/verb_cases.h"

namespace collegium::comm {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

constexpr milliseconds kShort{300};

// The error that ends run_ranks().
template <typename E>
std::string failure_of(int ranks, const std::function<void(Communicator&)>& fn,
                       const LocalOptions& options = {.timeout = milliseconds(20000)}) {
  try {
    run_ranks(ranks, fn, options);
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "an error of another type: " << error.what();
    return "";
  }
  ADD_FAILURE() << "no error";
  return "";
}

class LocalVerbs : public testing::TestWithParam<std::tuple<std::size_t, int>> {};

TEST_P(LocalVerbs, hold_on_every_number_of_ranks) {
  const auto [index, ranks] = GetParam();
  run_ranks(ranks, verb_cases()[index].body, {.timeout = milliseconds(60000)});
}

INSTANTIATE_TEST_SUITE_P(Local, LocalVerbs,
                         testing::Combine(testing::Range<std::size_t>(0, verb_cases().size()),
                                          testing::Values(1, 2, 3, 4, 7)),
                         [](const auto& test) {
                           return verb_cases()[std::get<0>(test.param)].name + "_" +
                                  std::to_string(std::get<1>(test.param));
                         });

// Who only asks moves the data too: no rank is in wait().
TEST(Local, asking_whether_a_long_operation_is_done_comes_to_an_end) {
  run_ranks(3, [](Communicator& comm) {
    const at::Tensor sums = at::full({200000}, 1.0, at::kDouble);
    Work work = comm.all_reduce(sums);
    const auto deadline = Clock::now() + std::chrono::seconds(20);
    while (!work.done() && Clock::now() < deadline) std::this_thread::yield();
    EXPECT_TRUE(work.done());
    work.wait();
    EXPECT_TRUE(at::equal(sums, at::full({200000}, 3.0, at::kDouble)));
  });
}

TEST(Local, single_rank_world_copies) {
  const auto comm = single_rank_world();
  for (const VerbCase& verb : verb_cases()) verb.body(*comm);
}

TEST(Local, more_shared_memory_than_addresses_is_refused_on_all_ranks) {
  run_ranks(3, [](Communicator& comm) {
    EXPECT_THROW(SharedMemory::create(comm, std::int64_t{1} << 60), Error);
    EXPECT_EQ(SharedMemory::create(comm, 1)->bytes(), 1);
  });
}

TEST(Local, nodes_follow_the_node_size) {
  run_ranks(5,
            [](Communicator& comm) {
              EXPECT_EQ(comm.node(0), 0);
              EXPECT_EQ(comm.node(1), 0);
              EXPECT_EQ(comm.node(4), 2);
              const auto odd = comm.split(comm.rank() % 2, comm.rank(), "parity");
              EXPECT_EQ(odd->node(1), 1);  // world rank 2 or 3
            },
            {.ranks_per_node = 2});
}

TEST(LocalMismatch, other_operation_names_rank_layer_and_operation) {
  const std::string text = failure_of<CommError>(3, [](Communicator& comm) {
    const WhereScope scope(comm.where(), {.step = 5, .layer = 2, .phase = "dispatch"});
    const at::Tensor tensor = at::ones({4});
    comm.rank() == 1 ? comm.broadcast(tensor, 0).wait() : comm.all_reduce(tensor).wait();
  });
  EXPECT_THAT(text,
              AllOf(HasSubstr("rank 1 (step 5, layer 2, dispatch) calls broadcast of Float"),
                    HasSubstr("rank 0 (step 5, layer 2, dispatch) calls all_reduce"), HasSubstr("'world'")));
}

TEST(LocalMismatch, sizes_dtypes_roots_and_rows_are_compared) {
  EXPECT_THAT(failure_of<CommError>(
                  2, [](Communicator& comm) { comm.all_reduce(at::ones({4 + comm.rank()})).wait(); }),
              AllOf(HasSubstr("sum of 4 elements"), HasSubstr("sum of 5 elements")));
  EXPECT_THAT(failure_of<CommError>(
                  2,
                  [](Communicator& comm) {
                    comm.all_reduce(at::ones({4}, comm.rank() == 0 ? at::kFloat : at::kDouble)).wait();
                  }),
              AllOf(HasSubstr("of Float"), HasSubstr("of Double")));
  EXPECT_THAT(
      failure_of<CommError>(2, [](Communicator& comm) { comm.broadcast(at::ones({4}), comm.rank()).wait(); }),
      AllOf(HasSubstr("root 0"), HasSubstr("root 1")));
  const auto wrong_rows = [](Communicator& comm) {
    const std::vector<std::int64_t> send = {1, 1};
    const std::vector<std::int64_t> recv = {1, comm.rank() == 0 ? 2 : 1};
    comm.all_to_all(at::ones({2, 3}), at::ones({recv[0] + recv[1], 3}), send, recv).wait();
  };
  EXPECT_THAT(failure_of<CommError>(2, wrong_rows),
              HasSubstr("sends 1 rows to rank 0, which expects 2 rows from rank 1"));
  EXPECT_THAT(failure_of<CommError>(2, disagree_on_blocks),
              HasSubstr("cuts the 3 rows for rank 1 into other blocks than that rank expects"));
  EXPECT_THAT(failure_of<CommError>(2,
                                    [](Communicator& comm) {
                                      if (comm.rank() == 0) comm.send(at::ones({3}), 1).wait();
                                      if (comm.rank() == 1) comm.recv(at::ones({4}), 0).wait();
                                    }),
              AllOf(HasSubstr("3 elements"), HasSubstr("4 elements")));
}

TEST(LocalArguments, impossible_ones_are_refused_before_communication) {
  const auto comm = single_rank_world();
  EXPECT_THROW((void)comm->all_reduce(at::ones({2}, at::kInt)), InternalError);
  EXPECT_THROW((void)comm->all_reduce(at::ones({2, 3}).t()), InternalError);
  EXPECT_THROW((void)comm->broadcast(at::ones({2}), 1), InternalError);
  EXPECT_THROW((void)comm->all_gather(at::ones({2}), at::ones({3})), InternalError);
  EXPECT_THROW((void)comm->send(at::ones({2}), 0, -1), InternalError);
  EXPECT_THROW((void)comm->send(at::ones({2}), 0, 4096), InternalError);
  const RankBlocks own{.rows = {{2}}, .block_major = false, .stays = 0};
  const RankBlocks copied{.rows = {{2}}, .block_major = false, .stays = -1};
  const RankBlocks of_another{.rows = {{2}}, .block_major = false, .stays = 1};
  const at::Tensor rows = at::ones({2, 3});
  EXPECT_THROW((void)comm->all_to_all(rows, rows, own, copied), InternalError);
  EXPECT_THROW((void)comm->all_to_all(rows, rows, of_another, of_another), InternalError);
  EXPECT_THROW(run_ranks(0, [](Communicator&) {}), ConfigError);
}

TEST(LocalTimeout, names_operation_group_and_missing_ranks) {
  std::promise<void> over;
  const std::shared_future<void> is_over = over.get_future().share();
  const auto start = Clock::now();
  const std::string text =
      failure_of<CommError>(4,
                            [&](Communicator& comm) {
                              const auto group = comm.split(comm.rank() / 2, comm.rank(), "ep");
                              if (comm.rank() == 3) {
                                is_over.wait();  // stops answering, comes back when the others have given up
                                return;
                              }
                              group->where() = {.step = 1, .layer = 7, .phase = "combine"};
                              try {
                                group->all_reduce(at::ones({2})).wait();
                              } catch (...) {
                                over.set_value();
                                throw;
                              }
                            },
                            {.timeout = kShort});
  EXPECT_THAT(text, AllOf(HasSubstr("rank 2 of 4"), HasSubstr("all_reduce"), HasSubstr("group 'ep'"),
                          HasSubstr("layer 7, combine"), HasSubstr("no answer within 0.3 s"),
                          HasSubstr("rank 1 (world rank 3)")));
  EXPECT_LT(Clock::now() - start, 20 * kShort);
}

TEST(LocalTimeout, a_message_that_is_never_sent_names_its_source) {
  const std::string text = failure_of<CommError>(2,
                                                 [&](Communicator& comm) {
                                                   if (comm.rank() == 0) {
                                                     std::this_thread::sleep_for(3 * kShort);
                                                   } else {
                                                     comm.recv(at::ones({2}), 0, 5).wait();
                                                   }
                                                 },
                                                 {.timeout = kShort});
  EXPECT_THAT(text, AllOf(HasSubstr("recv"), HasSubstr("from rank 0")));
}

TEST(LocalTimeout, a_rank_that_never_comes_back_is_left_behind_and_named) {
  static std::promise<void> over;  // outlives the rank that is left behind
  static std::promise<void> ended;
  const std::string text = failure_of<CommError>(2,
                                                 [](Communicator& comm) {
                                                   if (comm.rank() == 0) comm.barrier();
                                                   over.get_future().wait();
                                                   ended.set_value_at_thread_exit();
                                                 },
                                                 {.timeout = kShort});
  EXPECT_THAT(text, AllOf(HasSubstr("no answer within"), HasSubstr("rank 1 did not come back")));
  over.set_value();
  ended.get_future().wait();
}

TEST(LocalFailure, one_rank_fails_and_all_end_with_its_error) {
  const auto start = Clock::now();
  const std::string text = failure_of<ConfigError>(7, [](Communicator& comm) {
    const auto group = comm.split(0, comm.rank(), "ep");
    if (comm.rank() == 4) throw ConfigError("the shard is corrupt");
    for (;;) group->all_reduce(at::ones({100})).wait();
  });
  EXPECT_EQ(text, "rank 4 of 7: the shard is corrupt");
  EXPECT_LT(Clock::now() - start, milliseconds(10000));
}

TEST(LocalFailure, others_see_a_peer_failure) {
  std::atomic<int> peer_failures{0};
  failure_of<Error>(3, [&](Communicator& comm) {
    if (comm.rank() == 0) throw std::runtime_error("broken");
    try {
      comm.recv(at::ones({1}), 0).wait();
    } catch (const PeerFailure& error) {
      EXPECT_THAT(error.what(), HasSubstr("rank 0 of 3: broken"));
      ++peer_failures;
      throw;
    }
  });
  EXPECT_EQ(peer_failures, 2);
}

// A rank may tell others of its failure itself; theirs can then be the first to arrive.
TEST(LocalFailure, a_peer_failure_gives_way_to_the_failure_itself) {
  const std::string text = failure_of<ConfigError>(2, [](Communicator& comm) {
    if (comm.rank() == 0) throw PeerFailure("rank 1: the shard is corrupt");
    std::this_thread::sleep_for(milliseconds(50));
    throw ConfigError("the shard is corrupt");
  });
  EXPECT_EQ(text, "rank 1 of 2: the shard is corrupt");
}

TEST(LocalFailure, a_rank_that_ends_early_is_an_error_at_once) {
  const auto start = Clock::now();
  const std::string text = failure_of<CommError>(3, [](Communicator& comm) {
    if (comm.rank() == 2) return;
    comm.all_reduce(at::ones({1})).wait();
  });
  EXPECT_THAT(text, AllOf(HasSubstr("all_reduce"), HasSubstr("rank 2 (world rank 2) has ended")));
  EXPECT_LT(Clock::now() - start, milliseconds(10000));
}

TEST(LocalWork, nobody_waits_for_a_rank_that_only_computes) {
  // Rank 1 posts and does not wait: the others get their data all the same.
  std::promise<void> received;
  const std::shared_future<void> has_received = received.get_future().share();
  run_ranks(2,
            [&](Communicator& comm) {
              const at::Tensor tensor = at::full({1 << 20}, comm.rank() + 1.0);
              Work work = comm.all_reduce(tensor);
              if (comm.rank() == 1) has_received.wait();
              work.wait();
              EXPECT_EQ(tensor[77].item<double>(), 3.0);
              if (comm.rank() == 0) received.set_value();
              EXPECT_LE(work.timeline().posted, work.timeline().ready);
              EXPECT_LE(work.timeline().ready, work.timeline().began);
              EXPECT_LE(work.timeline().began, work.timeline().done);
            },
            {.timeout = milliseconds(10000)});
}

TEST(LocalWork, a_transfer_begins_when_something_moves) {
  run_ranks(2, [](Communicator& comm) {
    Work work = comm.all_reduce(at::ones({1 << 20}));
    comm.barrier();  // both have called
    std::this_thread::sleep_for(milliseconds(20));
    const Clock::time_point waits = Clock::now();
    comm.barrier();
    work.wait();
    EXPECT_LE(work.timeline().ready, waits);
    EXPECT_GT(work.timeline().began, waits);
  });
}

TEST(LocalWork, a_group_may_be_let_go_while_its_call_is_under_way) {
  for (int round = 0; round < 20; ++round) {
    run_ranks(3,
              [](Communicator& comm) {
                if (comm.rank() > 0) std::this_thread::sleep_for(milliseconds(comm.rank()));
                const at::Tensor sum = at::ones({3});
                Work work = comm.split(0, comm.rank(), "passing")->all_reduce(sum);
                work.wait();
                EXPECT_EQ(sum[1].item<double>(), 3.0);
              },
              {.timeout = milliseconds(5000)});
  }
}

}  // namespace
}  // namespace collegium::comm
