// SPDX-License-Identifier: Apache-2.0
#include "collegium/comm/emulated/emulated.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ctime>
#include <thread>

#include "collegium/comm/ledger.h"
#include "collegium/comm/local/local.h"
#include "tests/comm/verb_cases.h"

namespace collegium::comm {
namespace {

using testing::HasSubstr;

// Round numbers: 1 MB takes 10 ms within and 100 ms between nodes.
constexpr const char* kSlow = "nodes=2x2,intra=100MB/s:1ms,inter=10MB/s:5ms";
// What a sleep and the scheduler of a busy small machine may add.
constexpr double kLate = 0.060;

Call call_of(Operation operation, std::int64_t elements = 0) {
  Call call;
  call.operation = operation;
  call.elements = elements;
  return call;
}

std::vector<Member> members_of(const Network& network) {
  std::vector<Member> members;
  for (int r = 0; r < network.nodes * network.ranks_per_node; ++r)
    members.push_back({.world_rank = r, .node = network.node_of(r)});
  return members;
}

std::vector<double> simulate(const Network& network, const Call& call,
                             const std::vector<std::vector<std::int64_t>>& bytes) {
  std::vector<PortState> ports(bytes.size());
  return simulate_collective(network, members_of(network), call, bytes, ports);
}

TEST(Network, description_is_read_with_units_and_scale) {
  const Network network = parse_network("nodes=2x4,intra=300GB/s:2us,inter=50GB/s:10us,scale=16");
  EXPECT_EQ(network.nodes, 2);
  EXPECT_EQ(network.ranks_per_node, 4);
  EXPECT_DOUBLE_EQ(network.links[0].bytes_per_s, 300e9 / 16);
  EXPECT_DOUBLE_EQ(network.links[1].latency_s, 160e-6);
  EXPECT_EQ(network.node_of(3), 0);
  EXPECT_EQ(network.node_of(4), 1);
}

TEST(Network, wrong_descriptions_name_the_part) {
  const auto message = [](const std::string& text) -> std::string {
    try {
      parse_network(text);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THAT(message("nodes=2,intra=1GB/s:1us,inter=1GB/s:1us"), HasSubstr("nodes = \"2\""));
  EXPECT_THAT(message("nodes=2x0,intra=1GB/s:1us,inter=1GB/s:1us"), HasSubstr("at least 1"));
  EXPECT_THAT(message("nodes=65536x65536,intra=1GB/s:1us,inter=1GB/s:1us"),
              HasSubstr("nodes = \"65536x65536\": at most 16384 ranks in all"));
  EXPECT_EQ(message("nodes=2x2,intra=1GB/s:1us"), "network: inter: must be given");
  EXPECT_EQ(message("foo"), "network: foo: write name=value");
  EXPECT_THAT(message("nodes=2x2,intra=1Gb/s:1us,inter=1GB/s:1us"), HasSubstr("intra = \"1Gb/s\""));
  EXPECT_THAT(message("nodes=2x2,intra=1GB/s:1,inter=1GB/s:1us"), HasSubstr("a latency"));
  EXPECT_THAT(message("nodes=2x2,intra=0GB/s:1us,inter=1GB/s:1us"), HasSubstr("must be positive"));
  EXPECT_THAT(message("nodes=2x2,nodes=1x4,intra=1GB/s:1us,inter=1GB/s:1us"),
              HasSubstr("nodes = \"1x4\": given twice"));
  for (const std::string part : {"intra=infGB/s:1us", "intra=1GB/s:infs", "intra=1GB/s:nans"})
    EXPECT_THAT(message("nodes=2x2,inter=1GB/s:1us," + part), HasSubstr("intra = "));
  for (const std::string scale : {"inf", "1e300", "-1", "0"})
    EXPECT_THAT(message("nodes=2x2,intra=1GB/s:1us,inter=1GB/s:1us,scale=" + scale),
                HasSubstr("scale = \"" + scale + "\""));
  EXPECT_THAT(message("nodes=2x2,speed=3"), HasSubstr("known are nodes, intra, inter, scale"));
}

TEST(Network, all_to_all_takes_the_busiest_port_s_time) {
  const Network network = parse_network(kSlow);
  // Each rank sends 1 MB to each other: 10 ms + 1 ms within, two messages of 100 ms + 5 ms between, at the
  // same time.
  const std::vector<std::vector<std::int64_t>> even(4, std::vector<std::int64_t>(4, 1000000));
  for (const double end : simulate(network, call_of(Operation::kAllToAll), even))
    EXPECT_NEAR(end, 0.205, 1e-9);
  // Everything to rank 0: its port from the other node takes one after the other.
  std::vector<std::vector<std::int64_t>> hot(4, std::vector<std::int64_t>(4, 0));
  for (int r = 1; r < 4; ++r) hot[static_cast<std::size_t>(r)][0] = 1000000;
  const std::vector<double> ends = simulate(network, call_of(Operation::kAllToAll), hot);
  EXPECT_NEAR(ends[0], 0.205, 1e-9);
  EXPECT_NEAR(ends[1], 0.010, 1e-9);  // has sent
  EXPECT_NEAR(ends[2], 0.100, 1e-9);
}

TEST(Network, all_reduce_is_two_rounds_and_barrier_a_latency) {
  const Network network = parse_network(kSlow);
  const std::vector<std::vector<std::int64_t>> none(4, std::vector<std::int64_t>(4, 0));
  // Slices of 250 kB: per round two messages of 25 ms between nodes + 5 ms.
  for (const double end : simulate(network, call_of(Operation::kAllReduce, 1000000), none))
    EXPECT_NEAR(end, 2 * 0.055, 1e-9);
  for (const double end : simulate(network, call_of(Operation::kBarrier), none))
    EXPECT_NEAR(end, 0.005, 1e-9);
}

TEST(Emulated, verbs_hold) {
  run_ranks(4, [](Communicator& world) {
    const auto comm = with_emulated_network(world.shared_from_this(),
                                            parse_network("nodes=2x2,intra=300GB/s:2us,inter=50GB/s:10us"));
    for (const VerbCase& verb : verb_cases()) verb.body(*comm);
  });
}

TEST(Emulated, a_world_of_another_size_is_refused) {
  EXPECT_THROW(run_ranks(3,
                         [](Communicator& world) {
                           with_emulated_network(world.shared_from_this(), parse_network(kSlow));
                         }),
               ConfigError);
}

TEST(Emulated, ranks_of_several_machines_are_refused) {
  EXPECT_THROW(run_ranks(4,
                         [](Communicator& world) {
                           with_emulated_network(world.shared_from_this(), parse_network(kSlow),
                                                 world.rank() < 2 ? "a" : "b");
                         }),
               ConfigError);
}

TEST(Emulated, what_nobody_asked_for_took_as_long_as_the_network_takes) {
  run_ranks(4, [](Communicator& world) {
    const auto comm = with_emulated_network(world.shared_from_this(), parse_network(kSlow));
    comm->barrier();
    const at::Tensor x = at::zeros({4, 1000000}, at::kByte);
    Work work = comm->all_to_all(x, at::empty_like(x));
    std::this_thread::sleep_for(std::chrono::milliseconds(400));
    work.wait();
    const Timeline timeline = work.timeline();
    EXPECT_LE(std::chrono::duration<double>(timeline.done - timeline.began).count(), 0.205 + kLate);
  });
}

TEST(Emulated, waits_as_long_as_the_links_take_and_uses_no_cpu) {
  run_ranks(4, [](Communicator& world) {
    const auto ledger = std::make_shared<Ledger>();
    const auto comm =
        with_ledger(with_emulated_network(world.shared_from_this(), parse_network(kSlow)), ledger);
    comm->barrier();
    ledger->clear();
    std::timespec before{};
    std::timespec after{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &before);
    const at::Tensor x = at::zeros({4, 1000000}, at::kByte);
    const at::Tensor y = at::empty({4, 1000000}, at::kByte);
    comm->all_to_all(x, y).wait();
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &after);
    const LedgerEntry entry = ledger->sum([](const LedgerKey&) { return true; });
    // The last to post sees the whole of 205 ms, an earlier one less by as much as it came before.
    const at::Tensor longest = at::full({1}, entry.transfer_s, at::kDouble);
    world.all_reduce(longest, ReduceOp::kMax).wait();
    EXPECT_GE(longest.item<double>(), 0.205 - 1e-6);
    EXPECT_GE(entry.transfer_s, 0.205 - kLate);
    EXPECT_LE(entry.transfer_s, 0.205 + kLate);
    EXPECT_EQ(entry.bytes_within_nodes, 1000000);
    EXPECT_EQ(entry.bytes_between_nodes, 2000000);
    const double cpu_s = static_cast<double>(after.tv_sec - before.tv_sec) +
                         1e-9 * static_cast<double>(after.tv_nsec - before.tv_nsec);
    EXPECT_LE(cpu_s, 0.05);
  });
}

TEST(Emulated, computation_hides_transfers_and_the_ledger_sees_it) {
  run_ranks(4, [](Communicator& world) {
    const auto ledger = std::make_shared<Ledger>();
    const auto comm =
        with_ledger(with_emulated_network(world.shared_from_this(), parse_network(kSlow)), ledger);
    comm->barrier();
    ledger->clear();
    const at::Tensor x = at::zeros({4, 1000000}, at::kByte);
    const at::Tensor y = at::empty({4, 1000000}, at::kByte);
    Work work = comm->all_to_all(x, y);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));  // stands for computation
    work.wait();
    EXPECT_NEAR(ledger->overlap().hidden_share(), 100.0 / 205.0, 0.2);
  });
}

TEST(Emulated, a_message_takes_latency_and_bytes_over_bandwidth) {
  run_ranks(4, [](Communicator& world) {
    const auto comm = with_emulated_network(world.shared_from_this(), parse_network(kSlow));
    comm->barrier();
    const at::Tensor x = at::zeros({1000000}, at::kByte);
    if (comm->rank() == 0) comm->send(x, 2).wait();
    if (comm->rank() == 2) {
      Work work = comm->recv(x, 0);
      work.wait();
      const Timeline timeline = work.timeline();
      const double seconds = std::chrono::duration<double>(timeline.done - timeline.began).count();
      EXPECT_GE(seconds, 0.105 - kLate);
      EXPECT_LE(seconds, 0.105 + kLate);
    }
  });
}

}  // namespace
}  // namespace collegium::comm
