// SPDX-License-Identifier: Apache-2.0

// Bytes counted by the ledger against their closed forms, per arrow and rank.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "collegium/comm/ledger.h"
#include "collegium/moe/skews.h"
#include "tests/moe/dispatcher_cases.h"
#include "tests/moe/dispatcher_layouts.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::RoutingCase;

constexpr std::int64_t kWidth = 5;
constexpr std::int64_t kRowBytes = kWidth * 2;  // bfloat16
constexpr std::int64_t kWeightBytes = 4;        // float32

struct Bytes {
  std::int64_t dispatch = 0;
  std::int64_t combine = 0;
  std::int64_t combine_backward = 0;
  std::int64_t dispatch_backward = 0;

  bool operator==(const Bytes&) const = default;
};
// GoogleTest finds it by this name.
void PrintTo(const Bytes& b, std::ostream* out) {  // NOLINT(readability-identifier-naming)
  *out << b.dispatch << " " << b.combine << " " << b.combine_backward << " " << b.dispatch_backward;
}

// Runs the four arrows in bfloat16 on one chunk and gives what `bytes_of(entry)` finds in each, on one axis.
template <typename BytesOf>
std::vector<Bytes> count_bytes(const test::DispatcherLayout& layout, const RoutingCase& routing,
                               const std::string& axis, BytesOf bytes_of) {
  std::vector<Bytes> counted(static_cast<std::size_t>(layout.ranks));
  test::run_layout(layout, [&](const std::shared_ptr<comm::Communicator>& world) {
    const auto ledger = std::make_shared<comm::Ledger>();
    const auto ep = comm::with_ledger(world, ledger);
    const auto dispatcher = test::make_dispatcher_of(layout.options, routing.num_experts, ep);
    const at::Tensor ids = routing.ids_TK(ep->rank(), ep->size());
    const auto handle = dispatcher->plan({.chunk_ids_TK = {&ids, 1}, .where = {}})[0];
    const at::Tensor x = at::ones({ids.size(0), kWidth}, at::kBFloat16);
    const auto rows = dispatcher->dispatch(x, at::ones(ids.sizes()), handle).wait();
    dispatcher->combine(rows.rows.tensor(), handle).wait();
    const at::Tensor grad = dispatcher->combine_backward(x, handle).wait().tensor();
    dispatcher->dispatch_backward(grad, rows.weights_R, handle).wait();
    const auto phase = [&](const std::string& name) {
      return bytes_of(
          ledger->sum([&](const comm::LedgerKey& key) { return key.phase == name && key.axis == axis; }));
    };
    counted[static_cast<std::size_t>(ep->rank())] = {.dispatch = phase("dispatch"),
                                                     .combine = phase("combine"),
                                                     .combine_backward = phase("combine backward"),
                                                     .dispatch_backward = phase("dispatch backward")};
  });
  return counted;
}

std::int64_t all_bytes(const comm::LedgerEntry& entry) {
  return entry.bytes_within_nodes + entry.bytes_between_nodes;
}
std::int64_t bytes_between_nodes(const comm::LedgerEntry& entry) { return entry.bytes_between_nodes; }

// counts_PE[r][e]: slots of rank r that go to expert e.
std::vector<std::vector<std::int64_t>> slot_counts(const RoutingCase& routing, int ranks) {
  std::vector<std::vector<std::int64_t>> counts_PE;
  for (int rank = 0; rank < ranks; ++rank) {
    counts_PE.emplace_back(static_cast<std::size_t>(routing.num_experts), 0);
    const at::Tensor ids = routing.ids_TK(rank, ranks);
    const auto* id = ids.const_data_ptr<std::int32_t>();
    for (std::int64_t slot = 0; slot < ids.numel(); ++slot) {
      if (id[slot] >= 0) ++counts_PE.back()[static_cast<std::size_t>(id[slot])];
    }
  }
  return counts_PE;
}

TEST(DispatcherBytes, uneven_sends_exactly_the_routed_rows) {
  for (const int ranks : {2, 3, 7}) {
    for (const RoutingCase& routing : test::all_routings()) {
      const auto counts_PE = slot_counts(routing, ranks);
      const moe::ExpertPlacement placement{.num_experts = routing.num_experts, .num_ranks = ranks};
      std::vector<Bytes> expected;
      for (int rank = 0; rank < ranks; ++rank) {
        std::int64_t sent = 0;      // rows to experts of other ranks
        std::int64_t received = 0;  // rows from other ranks
        for (int other = 0; other < ranks; ++other) {
          for (std::int64_t e = 0; e < routing.num_experts; ++e) {
            const auto expert = static_cast<std::size_t>(e);
            const int holder = placement.rank_of(e);
            if (other == rank && holder != rank) sent += counts_PE[static_cast<std::size_t>(rank)][expert];
            if (other != rank && holder == rank)
              received += counts_PE[static_cast<std::size_t>(other)][expert];
          }
        }
        expected.push_back({.dispatch = sent * (kRowBytes + kWeightBytes),
                            .combine = received * kRowBytes,
                            .combine_backward = sent * kRowBytes,
                            .dispatch_backward = received * (kRowBytes + kWeightBytes)});
      }
      EXPECT_EQ(count_bytes({.options = {}, .ranks = ranks}, routing, "world", all_bytes), expected)
          << routing.name;
    }
  }
}

TEST(DispatcherBytes, padded_sends_a_block_per_rank_and_expert) {
  const int ranks = 3;
  for (const RoutingCase& routing : test::all_routings()) {
    std::int64_t block = 0;
    for (const auto& counts_E : slot_counts(routing, ranks))
      block = std::max(block, *std::max_element(counts_E.begin(), counts_E.end()));
    const moe::ExpertPlacement placement{.num_experts = routing.num_experts, .num_ranks = ranks};
    std::vector<Bytes> expected;
    for (int rank = 0; rank < ranks; ++rank) {
      const std::int64_t sent = (routing.num_experts - placement.count(rank)) * block;
      const std::int64_t received = (ranks - 1) * placement.count(rank) * block;
      expected.push_back({.dispatch = sent * (kRowBytes + kWeightBytes),
                          .combine = received * kRowBytes,
                          .combine_backward = sent * kRowBytes,
                          .dispatch_backward = received * (kRowBytes + kWeightBytes)});
    }
    const test::DispatcherLayout layout{.options = {.kind = moe::DispatcherKind::kPadded}, .ranks = ranks};
    EXPECT_EQ(count_bytes(layout, routing, "world", all_bytes), expected) << routing.name;
  }
}

TEST(DispatcherBytes, allgather_sends_all_tokens_to_all_ranks) {
  const int ranks = 3;
  for (const bool combine_fp32 : {false, true}) {
    const std::int64_t sum_bytes = kWidth * (combine_fp32 ? 4 : 2);
    for (const RoutingCase& routing : test::all_routings()) {
      std::int64_t total = 0;
      for (int rank = 0; rank < ranks; ++rank) total += routing.tokens(rank);
      std::vector<Bytes> expected;
      for (int rank = 0; rank < ranks; ++rank) {
        const std::int64_t own = routing.tokens(rank);
        const std::int64_t weights = routing.top_k * kWeightBytes;
        expected.push_back({.dispatch = (ranks - 1) * own * (kRowBytes + weights),
                            .combine = (total - own) * sum_bytes,
                            .combine_backward = (ranks - 1) * own * kRowBytes,
                            .dispatch_backward = (total - own) * (sum_bytes + weights)});
      }
      const test::DispatcherLayout layout{
          .options = {.kind = moe::DispatcherKind::kAllgather, .combine_fp32 = combine_fp32}, .ranks = ranks};
      EXPECT_EQ(count_bytes(layout, routing, "world", all_bytes), expected) << routing.name;
    }
  }
}

TEST(DispatcherBytes, shared_memory_sends_a_number_per_meeting_and_kind) {
  constexpr std::int64_t kNumber = 8;
  const std::int64_t ranks = 3;
  for (const RoutingCase& routing : test::all_routings()) {
    const std::vector<Bytes> expected(ranks, {.dispatch = (ranks - 1) * 2 * kNumber,
                                              .combine = (ranks - 1) * kNumber,
                                              .combine_backward = (ranks - 1) * kNumber,
                                              .dispatch_backward = (ranks - 1) * 2 * kNumber});
    const test::DispatcherLayout layout{.options = {.kind = moe::DispatcherKind::kSharedMemory},
                                        .ranks = ranks};
    EXPECT_EQ(count_bytes(layout, routing, "world", all_bytes), expected) << routing.name;
  }
}

// Of one rank: what two_level sends to other nodes, and gets from them.
struct RailTraffic {
  std::int64_t copies = 0;  // sum over tokens of the number of other nodes that hold any of its experts
  std::int64_t pairs = 0;   // (token, choice) pairs with their expert on another node
};

RailTraffic rail_traffic(const at::Tensor& ids_TK, const moe::ExpertPlacement& placement, int own_node,
                         int ranks_per_node) {
  RailTraffic traffic;
  const auto* id = ids_TK.const_data_ptr<std::int32_t>();
  for (std::int64_t token = 0; token < ids_TK.size(0); ++token) {
    std::set<int> nodes;
    for (std::int64_t k = 0; k < ids_TK.size(1); ++k, ++id) {
      if (*id < 0 || placement.rank_of(*id) / ranks_per_node == own_node) continue;
      nodes.insert(placement.rank_of(*id) / ranks_per_node);
      ++traffic.pairs;
    }
    traffic.copies += static_cast<std::int64_t>(nodes.size());
  }
  return traffic;
}

TEST(DispatcherBytes, two_level_crosses_to_each_node_once) {
  for (const bool combine_fp32 : {false, true}) {
    for (const auto& [ranks, per_node] : {std::pair{4, 2}, {8, 2}, {6, 3}}) {
      const test::DispatcherLayout layout{
          .options = {.kind = moe::DispatcherKind::kTwoLevel, .combine_fp32 = combine_fp32},
          .ranks = ranks,
          .ranks_per_node = per_node};
      for (const RoutingCase& routing : test::all_routings()) {
        const moe::ExpertPlacement placement{.num_experts = routing.num_experts, .num_ranks = ranks};
        RailTraffic sent;
        for (int rank = 0; rank < ranks; ++rank) {
          const RailTraffic of_rank =
              rail_traffic(routing.ids_TK(rank, ranks), placement, rank / per_node, per_node);
          sent.copies += of_rank.copies;
          sent.pairs += of_rank.pairs;
        }
        const std::int64_t sum_bytes = kWidth * (combine_fp32 ? 4 : 2);
        Bytes total;
        for (const Bytes& bytes : count_bytes(layout, routing, "rail", bytes_between_nodes)) {
          total.dispatch += bytes.dispatch;
          total.combine += bytes.combine;
          total.combine_backward += bytes.combine_backward;
          total.dispatch_backward += bytes.dispatch_backward;
        }
        const Bytes expected{.dispatch = sent.copies * kRowBytes + sent.pairs * kWeightBytes,
                             .combine = sent.copies * sum_bytes,
                             .combine_backward = sent.copies * kRowBytes,
                             .dispatch_backward = sent.copies * sum_bytes + sent.pairs * kWeightBytes};
        EXPECT_EQ(total, expected) << layout.name() << " " << routing.name;
        for (const Bytes& bytes : count_bytes(layout, routing, "node", bytes_between_nodes))
          EXPECT_EQ(bytes, Bytes{}) << "nothing of the fan-out leaves its node";
      }
    }
  }
}

// log of the number of ways to choose k of n.
double log_choose(double n, double k) {
  return std::lgamma(n + 1) - std::lgamma(k + 1) - std::lgamma(n - k + 1);
}

TEST(DispatcherBytes, two_level_traffic_of_random_routing_is_the_expected_one) {
  // A token needs D(G) = G (1 - C(E - E/G, K) / C(E, K)) of G nodes, and its own is one of them with
  // probability D(G) / G.
  for (const auto& [num_experts, top_k, nodes] :
       {std::tuple{64, 8, 2}, {64, 8, 4}, {8, 2, 4}, {128, 8, 4}, {16, 1, 2}}) {
    constexpr std::int64_t kTokens = 2000;
    const int ranks = 2 * nodes;
    const at::Tensor ids =
        moe::random_ids_TK({.num_experts = num_experts, .top_k = top_k}, 0, 0, ranks * kTokens);
    const RoutingCase routing{.name = "random",
                              .num_experts = num_experts,
                              .top_k = top_k,
                              .tokens = [](int) { return kTokens; },
                              .expert =
                                  [&ids, top_k = top_k](const test::RoutingSlot& s) {
                                    const std::int64_t token = s.rank * kTokens + s.token;
                                    return ids.const_data_ptr<std::int32_t>()[token * top_k + s.choice];
                                  }};
    const test::DispatcherLayout layout{
        .options = {.kind = moe::DispatcherKind::kTwoLevel}, .ranks = ranks, .ranks_per_node = 2};
    double copies = 0.0;
    for (const Bytes& bytes : count_bytes(layout, routing, "rail", bytes_between_nodes))
      copies += static_cast<double>(bytes.combine_backward) / kRowBytes;
    // The sample's own spread gives the error of its mean.
    const moe::ExpertPlacement placement{.num_experts = num_experts, .num_ranks = ranks};
    double squares = 0.0;
    for (std::int64_t token = 0; token < ids.size(0); ++token) {
      const auto of_token =
          rail_traffic(ids.narrow(0, token, 1), placement, static_cast<int>(token / (2 * kTokens)), 2);
      squares += static_cast<double>(of_token.copies * of_token.copies);
    }
    const auto tokens = static_cast<double>(ids.size(0));
    const double mean = copies / tokens;
    const double standard_error = std::sqrt((squares / tokens - mean * mean) / tokens);
    const double e = num_experts;
    const double g = nodes;
    const double d = g * (1.0 - std::exp(log_choose(e - e / g, top_k) - log_choose(e, top_k)));
    // Four standard errors: exceeded by chance once in 16000 cases.
    EXPECT_NEAR(mean, d * (1.0 - 1.0 / g), 4.0 * standard_error) << "E=" << num_experts << " G=" << nodes;
  }
}

}  // namespace
}  // namespace collegium
