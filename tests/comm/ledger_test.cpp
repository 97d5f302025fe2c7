// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/ledger.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "collegium/comm/local/local.h"
#include "tests/comm/verb_cases.h"

namespace collegium::comm {
namespace {

using std::chrono::milliseconds;
using testing::AllOf;
using testing::HasSubstr;

LedgerEntry total(const Ledger& ledger) {
  return ledger.sum([](const LedgerKey&) { return true; });
}

TEST(Ledger, passes_all_verbs_on_with_and_without_checks) {
  for (const bool check : {false, true}) {
    for (const int ranks : {1, 2, 3, 7}) {
      run_ranks(ranks, [check](Communicator& world) {
        const auto comm = with_ledger(world.shared_from_this(), std::make_shared<Ledger>(), {.check = check});
        for (const VerbCase& verb : verb_cases()) verb.body(*comm);
      });
    }
  }
}

TEST(Ledger, bytes_equal_the_closed_form) {
  // 2 nodes of 2 ranks; 8 x 3 float32 = 96 bytes per tensor.
  run_ranks(4,
            [](Communicator& world) {
              const auto ledger = std::make_shared<Ledger>();
              const auto comm = with_ledger(world.shared_from_this(), ledger);
              const int r = comm->rank();
              const auto expect = [&](std::int64_t within, std::int64_t between) {
                EXPECT_EQ(total(*ledger).bytes_within_nodes, within);
                EXPECT_EQ(total(*ledger).bytes_between_nodes, between);
                ledger->clear();
              };
              const at::Tensor x = at::ones({8, 3});
              comm->all_reduce(x).wait();  // 2 · 96 · 3/4 = 144 over three peers
              expect(48, 96);
              comm->all_gather(x, at::empty({32, 3})).wait();  // 96 to each of three
              expect(96, 192);
              comm->reduce_scatter(x, at::empty({2, 3})).wait();  // 24 to each of three
              expect(24, 48);
              comm->broadcast(x, 0).wait();
              expect(r == 0 ? 96 : 0, r == 0 ? 192 : 0);
              // Rank r sends r+p rows of 12 bytes to rank p.
              std::vector<std::int64_t> rows;
              for (int p = 0; p < 4; ++p) rows.push_back(r + p);
              const std::int64_t sum = 4 * r + 6;
              comm->all_to_all(at::ones({sum, 3}), at::empty({sum, 3}), rows, rows).wait();
              const int mate = r ^ 1;
              expect(12 * (r + mate), 12 * (sum - 2 * r - (r + mate)));
              comm->barrier();
              expect(0, 0);
            },
            {.ranks_per_node = 2});
}

TEST(Ledger, sums_by_step_layer_phase_axis_and_operation) {
  run_ranks(2, [](Communicator& world) {
    const auto ledger = std::make_shared<Ledger>();
    const auto comm = with_ledger(world.shared_from_this(), ledger);
    const auto same = comm->split(0, comm->rank(), "dp");
    ledger->clear();
    for (const int layer : {0, 1, 1}) {
      const WhereScope scope(comm->where(), {.step = 4, .layer = layer, .phase = "dispatch"});
      comm->all_reduce(at::ones({2})).wait();
    }
    same->all_reduce(at::ones({2})).wait();
    ASSERT_EQ(ledger->entries().size(), 3U);
    EXPECT_EQ(ledger->entries()
                  .at({.step = 4,
                       .layer = 1,
                       .phase = "dispatch",
                       .axis = "world",
                       .operation = Operation::kAllReduce})
                  .calls,
              2);
    EXPECT_EQ(ledger->sum([](const LedgerKey& key) { return key.axis == "dp"; }).calls, 1);
  });
}

TEST(Ledger, hidden_time_is_an_intersection_of_intervals) {
  // ms:       0    10   20   30   40   50
  // transfers [---------)    [----)          [0,20) [10,20) [30,40)
  // waits          [--------------)          [10,40)
  const Clock::time_point zero{};
  const auto at_ms = [&](int ms) { return zero + milliseconds(ms); };
  Ledger ledger;
  LedgerKey key;
  key.operation = Operation::kAllToAll;
  ledger.add_times(key, {.posted = at_ms(0), .ready = at_ms(0), .began = at_ms(0), .done = at_ms(20)},
                   at_ms(10), at_ms(25));
  ledger.add_times(key, {.posted = at_ms(5), .ready = at_ms(10), .began = at_ms(10), .done = at_ms(20)},
                   at_ms(25), at_ms(25));
  ledger.add_times(key, {.posted = at_ms(25), .ready = at_ms(30), .began = at_ms(30), .done = at_ms(40)},
                   at_ms(25), at_ms(40));
  EXPECT_NEAR(ledger.overlap().communicating_s, 0.030, 1e-12);
  EXPECT_NEAR(ledger.overlap().hidden_s, 0.010, 1e-12);
  EXPECT_NEAR(ledger.overlap(Operation::kAllToAll).hidden_share(), 1.0 / 3.0, 1e-12);
  EXPECT_EQ(ledger.overlap(Operation::kSend).hidden_share(), 0.0);
  EXPECT_NEAR(total(ledger).skew_s, 0.010, 1e-12);
  EXPECT_NEAR(total(ledger).waiting_s, 0.030, 1e-12);
}

TEST(LedgerCheck, a_mismatch_names_rank_layer_and_operation_before_anything_blocks) {
  const auto disagree = [](Communicator& world) {
    const auto comm = with_ledger(world.shared_from_this(), std::make_shared<Ledger>(), {.check = true});
    const WhereScope scope(comm->where(), {.step = 1, .layer = 2 + comm->rank(), .phase = "combine"});
    try {
      comm->rank() == 1 ? comm->barrier() : comm->all_reduce(at::ones({4})).wait();
      ADD_FAILURE() << "no error";
    } catch (const PeerFailure&) {
      throw;
    } catch (const CommError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 0 (step 1, layer 2, combine) calls all_reduce"),
                                      HasSubstr("rank 1 (step 1, layer 3, combine) calls barrier")));
    }
  };
  run_ranks(3, disagree);
}

TEST(LedgerCheck, blocks_are_compared) {
  const auto disagree = [](Communicator& world) {
    const auto comm = with_ledger(world.shared_from_this(), std::make_shared<Ledger>(), {.check = true});
    try {
      disagree_on_blocks(*comm);
      ADD_FAILURE() << "no error";
    } catch (const PeerFailure&) {
      throw;
    } catch (const CommError& error) {
      EXPECT_THAT(error.what(),
                  HasSubstr("cuts the 3 rows for rank 1 into other blocks than that rank expects"));
    }
  };
  run_ranks(2, disagree);
}

TEST(LedgerCheck, messages_are_compared_before_they_are_received) {
  EXPECT_THROW(run_ranks(2,
                         [](Communicator& world) {
                           const auto comm = with_ledger(world.shared_from_this(), std::make_shared<Ledger>(),
                                                         {.check = true});
                           if (comm->rank() == 0) comm->send(at::ones({3}), 1).wait();
                           if (comm->rank() == 1) comm->recv(at::ones({3}, at::kDouble), 0).wait();
                         }),
               CommError);
}

}  // namespace
}  // namespace collegium::comm
