// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <mutex>
#include <set>

#include "collegium/base/error.h"
#include "collegium/comm/local/local.h"
#include "collegium/model/account.h"
#include "collegium/parallel/gradient_sync.h"
#include "collegium/parallel/groups.h"
#include "collegium/parallel/rank_card.h"
#include "collegium/parallel/shares.h"

namespace collegium {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

parallel::ParallelOptions with_ep(std::int64_t ep) {
  parallel::ParallelOptions options;
  options.ep = ep;
  return options;
}

TEST(Shares, cover_every_sequence_once_in_whole_groups) {
  for (const std::int64_t group : {1, 2, 3}) {
    for (const int num_ranks : {1, 2, 3, 4, 7}) {
      for (std::int64_t groups = 0; groups <= 9; ++groups) {
        const std::int64_t total = groups * group;
        std::int64_t next = 0;
        for (int rank = 0; rank < num_ranks; ++rank) {
          const parallel::Share share = parallel::share_of(total, group, num_ranks, rank);
          EXPECT_EQ(share.first, next);
          EXPECT_EQ(share.count % group, 0);
          next += share.count;
        }
        EXPECT_EQ(next, total);
        EXPECT_EQ(parallel::share_rows(total, group, num_ranks, 5).size(),
                  static_cast<std::size_t>(num_ranks));
      }
    }
  }
  EXPECT_EQ(parallel::share_of(3, 1, 7, 6).count, 0);  // more ranks than sequences
}

TEST(Placement, spreads_what_does_not_divide) {
  const moe::ExpertPlacement six_on_four{.num_experts = 6, .num_ranks = 4};
  EXPECT_EQ(six_on_four.count(0), 2);
  EXPECT_EQ(six_on_four.count(1), 2);
  EXPECT_EQ(six_on_four.count(3), 1);
  for (std::int64_t expert = 0; expert < 6; ++expert) {
    const int rank = six_on_four.rank_of(expert);
    EXPECT_LE(six_on_four.first(rank), expert);
    EXPECT_GT(six_on_four.first(rank + 1), expert);
  }
}

TEST(ExpertParallelism, is_chosen_or_checked) {
  EXPECT_EQ(parallel::resolve_ep(with_ep(0), 8, 6), 4);
  EXPECT_EQ(parallel::resolve_ep(with_ep(0), 7, 6), 1);
  EXPECT_EQ(parallel::resolve_ep(with_ep(2), 4, 6), 2);
  const auto message = [](std::int64_t ep, int ranks, std::int64_t experts) {
    try {
      parallel::resolve_ep(with_ep(ep), ranks, experts);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(3, 4, 6), "parallel.ep = 3: must divide the number of ranks, 4");
  EXPECT_EQ(message(8, 8, 6), "parallel.ep = 8: must not exceed model.moe.num_experts = 6");
}

TEST(RankCards, absurd_sizes_are_refused_before_they_overflow) {
  model::ModelConfig config;
  config.vocab_size = config.hidden_size = std::numeric_limits<std::int32_t>::max() - 3;
  config.num_layers = config.num_heads = 1;
  config.moe.num_experts = 1 << 20;
  config.moe.ffn_size = std::numeric_limits<std::int32_t>::max();
  model::complete(config);
  EXPECT_THROW(model::count_parameters(config), ConfigError);
  EXPECT_THROW(parallel::make_rank_cards(config, with_ep(1), 1, 8, /*bytes_per_value=*/2), ConfigError);
}

// 6 experts with two replicas of two ranks, as docs/parallel.md draws it.
TEST(RankCards, worked_example) {
  model::ModelConfig config;
  config.vocab_size = 32;
  config.hidden_size = 8;
  config.num_layers = 1;
  config.num_heads = 1;
  config.moe.num_experts = 6;
  config.moe.top_k = 2;
  config.moe.ffn_size = 4;
  model::complete(config);
  const auto cards = parallel::make_rank_cards(config, with_ep(2), 4, 8, /*bytes_per_value=*/2);
  ASSERT_EQ(cards.size(), 4U);
  EXPECT_THAT(cards[2].ep_group, testing::ElementsAre(2, 3));
  EXPECT_THAT(cards[2].edp_group, testing::ElementsAre(0, 2));
  EXPECT_EQ(cards[3].first_expert, 3);
  EXPECT_EQ(cards[3].num_experts, 3);
  EXPECT_EQ(cards[3].expert_parameters, 3 * 3 * 8 * 4);
  EXPECT_EQ(cards[3].value_bytes, 2 * (cards[3].expert_parameters + cards[3].dense_parameters));
  EXPECT_EQ(cards[3].optimizer_bytes, 12 * (cards[3].expert_parameters + cards[3].dense_parameters));
  EXPECT_EQ(cards[1].sequences, 2);
  EXPECT_THAT(parallel::rank_cards_text(cards, config, with_ep(2)), HasSubstr("edp = dp / ep = 2 copies"));

  // Groups that share a capacity stay whole.
  config.moe.capacity.group_sequences = 2;
  const auto sequences = [&] {
    std::vector<std::int64_t> all;
    for (const parallel::RankCard& card : parallel::make_rank_cards(config, with_ep(1), 3, 8, 2))
      all.push_back(card.sequences);
    return all;
  };
  EXPECT_THAT(sequences(), testing::ElementsAre(3, 3, 2));
  config.moe.capacity.drop_policy = moe::DropPolicy::kPosition;
  EXPECT_THAT(sequences(), testing::ElementsAre(4, 2, 2));
}

// N (1 - C(E - E/N, K) / C(E, K)) by hand, beside K / 2.
TEST(ChosenDispatcher, is_two_level_where_a_tokens_experts_share_few_places) {
  using moe::DispatcherKind;
  const auto chosen = [](const std::vector<int>& nodes, std::int64_t experts, std::int64_t top_k) {
    return parallel::chosen_dispatcher(nodes, experts, top_k);
  };
  EXPECT_EQ(chosen({0}, 64, 8), DispatcherKind::kUneven);                         // one rank
  EXPECT_EQ(chosen({0, 0}, 8, 2), DispatcherKind::kUneven);                       // 2 (1 - 6/28) = 1.57 > 1
  EXPECT_EQ(chosen({0, 0}, 8, 4), DispatcherKind::kTwoLevel);                     // 2 (1 - 1/70) = 1.97 <= 2
  EXPECT_EQ(chosen({0, 0}, 64, 8), DispatcherKind::kTwoLevel);                    // 2 - 0.005 <= 4
  EXPECT_EQ(chosen({0, 0, 0, 0}, 64, 8), DispatcherKind::kTwoLevel);              // 4 (1 - 0.085) = 3.66 <= 4
  EXPECT_EQ(chosen({0, 0, 0, 0, 0, 0, 0}, 64, 8), DispatcherKind::kUneven);       // 7 (1 - 0.264) = 5.2 > 4
  EXPECT_EQ(chosen({0, 0, 0, 0, 1, 1, 1, 1}, 64, 8), DispatcherKind::kTwoLevel);  // two nodes: 1.99 <= 4
  EXPECT_EQ(chosen({0, 0, 1}, 64, 8), DispatcherKind::kUneven);                   // uneven nodes
  EXPECT_EQ(chosen({3, 5, 3, 5}, 64, 8), DispatcherKind::kTwoLevel);              // nodes that take turns
  EXPECT_EQ(chosen({0, 0, 0}, 4, 4), DispatcherKind::kUneven);                    // every expert: 3 > 2
  EXPECT_EQ(chosen({0, 0}, 4, 4), DispatcherKind::kTwoLevel);                     // 2 <= 2
}

moe::MoeOptions with_experts(std::int64_t num_experts, std::int64_t top_k) {
  moe::MoeOptions moe;
  moe.num_experts = num_experts;
  moe.top_k = top_k;
  return moe;
}

std::set<moe::DispatcherKind> dispatchers_of_ranks(int num_ranks, int ranks_per_node,
                                                   const parallel::ParallelOptions& options,
                                                   const moe::MoeOptions& moe) {
  std::mutex mutex;
  std::set<moe::DispatcherKind> kinds;
  comm::run_ranks(num_ranks,
                  [&](comm::Communicator& world) {
                    const auto kind =
                        parallel::make_groups(world.shared_from_this(), options, moe).dispatcher.kind;
                    const std::lock_guard lock(mutex);
                    kinds.insert(kind);
                  },
                  {.ranks_per_node = ranks_per_node});
  return kinds;
}

TEST(Dispatcher, is_the_users_or_chosen_for_all_ranks) {
  using moe::DispatcherKind;
  EXPECT_THAT(dispatchers_of_ranks(4, 0, with_ep(2), with_experts(8, 1)),
              ElementsAre(DispatcherKind::kUneven));
  EXPECT_THAT(dispatchers_of_ranks(4, 0, with_ep(2), with_experts(8, 4)),
              ElementsAre(DispatcherKind::kTwoLevel));
  EXPECT_THAT(dispatchers_of_ranks(4, 0, with_ep(4), with_experts(8, 4)),
              ElementsAre(DispatcherKind::kUneven));
  EXPECT_THAT(dispatchers_of_ranks(4, 2, with_ep(4), with_experts(8, 4)),
              ElementsAre(DispatcherKind::kTwoLevel));
  // Of two groups the first is on one node, where uneven suits it, the second on two.
  EXPECT_THAT(dispatchers_of_ranks(8, 6, with_ep(4), with_experts(8, 4)),
              ElementsAre(DispatcherKind::kUneven));
  moe::MoeOptions choosing = with_experts(8, 4);
  choosing.router.selection = moe::Selection::kExpertChoice;
  EXPECT_THAT(dispatchers_of_ranks(4, 0, with_ep(2), choosing), ElementsAre(DispatcherKind::kUneven));
  parallel::ParallelOptions padded = with_ep(2);
  padded.dispatcher.kind = DispatcherKind::kPadded;
  EXPECT_THAT(dispatchers_of_ranks(4, 0, padded, with_experts(8, 4)), ElementsAre(DispatcherKind::kPadded));
}

// Gradients of rank r are r + 1 in every element, so sums over 4 ranks are 10, over {0, 2} 4 and over {1,
// 3} 6.
void sum_gradients(comm::Communicator& world, bool overlap) {
  parallel::ParallelOptions options = with_ep(2);
  options.overlap_gradients = overlap;
  options.bucket_mib = 1e-4;
  const parallel::Groups groups =
      parallel::make_groups(world.shared_from_this(), options, with_experts(6, 2));
  const at::Tensor dense = at::zeros({70}, at::kDouble);
  const at::Tensor experts = at::zeros({40}, at::kDouble);
  std::vector<parallel::GradientSlot> slots;
  for (const auto& [begin, size, expert] : std::vector<std::tuple<int, int, bool>>{
           {0, 30, false}, {0, 15, true}, {30, 40, false}, {15, 25, true}}) {
    slots.push_back({.leaf = at::ones({size}, at::kDouble).requires_grad_(true),
                     .sum = (expert ? experts : dense).narrow(0, begin, size),
                     .expert = expert});
  }
  const auto parameters = slots;
  parallel::GradientSync sync(groups, options, std::move(slots), dense, experts);
  const double value = world.rank() + 1;
  for (int step = 1; step <= 2; ++step) {
    dense.zero_();
    experts.zero_();
    at::Tensor loss = at::zeros({}, at::kDouble);
    for (const auto& slot : parameters) loss = loss + value * slot.leaf.sum();
    sync.begin_last_backward();
    loss.backward();
    for (const auto& slot : parameters) {  // what the hooks have not taken
      const at::NoGradGuard no_grad;
      if (!slot.leaf.grad().defined()) continue;
      slot.sum.add_(slot.leaf.grad());
      slot.leaf.mutable_grad().reset();
    }
    sync.finish(step);
    EXPECT_TRUE((dense == 10.0).all().item<bool>());
    EXPECT_TRUE((experts == (world.rank() % 2 == 0 ? 4.0 : 6.0)).all().item<bool>());
  }
  const auto is_sum = [](const comm::LedgerKey& key) { return key.phase == "gradients"; };
  // 1e-4 MiB hold 13 doubles, so with overlap every parameter is a bucket; without, each kind is one.
  EXPECT_EQ(groups.ledger->sum(is_sum).calls, 2 * (overlap ? 4 : 2));
}

TEST(GradientSync, sums_dense_over_all_and_experts_over_their_copies) {
  for (const bool overlap : {false, true})
    comm::run_ranks(4, [&](comm::Communicator& world) { sum_gradients(world, overlap); });
}

// Rank 0's experts fill two buckets, rank 1's one, which ends in the first layer only. Between the layers'
// backward passes the ranks of ep meet; with the check, a dense bucket that rank 0 starts before, and rank 1
// not, would wait there for ever.
TEST(GradientSync, dense_sums_start_alike_on_ranks_that_hold_other_experts) {
  constexpr std::chrono::seconds kTimeout{20};
  const auto sum_on = [](comm::Communicator& world) {
    parallel::ParallelOptions options = with_ep(2);
    options.overlap_gradients = true;
    options.check_collectives = true;
    options.bucket_mib = 2.4e-4;  // 31 doubles
    const parallel::Groups groups =
        parallel::make_groups(world.shared_from_this(), options, with_experts(3, 2));
    const std::int64_t size = world.rank() == 0 ? 25 : 10;  // of an expert
    const at::Tensor dense = at::zeros({60}, at::kDouble);
    const at::Tensor experts = at::zeros({2 * size}, at::kDouble);
    std::vector<parallel::GradientSlot> slots;
    for (const std::int64_t layer : {0, 1}) {
      slots.push_back({.leaf = at::ones({30}, at::kDouble).requires_grad_(true),
                       .sum = dense.narrow(0, 30 * layer, 30),
                       .expert = false});
      slots.push_back({.leaf = at::ones({size}, at::kDouble).requires_grad_(true),
                       .sum = experts.narrow(0, size * layer, size),
                       .expert = true});
    }
    const auto parameters = slots;
    parallel::GradientSync sync(groups, options, std::move(slots), dense, experts);
    const at::Tensor first = parameters[0].leaf.sum() + parameters[1].leaf.sum();
    first.register_hook([&](const at::Tensor&) { groups.ep->barrier(); });
    const at::Tensor loss = first + (parameters[2].leaf.sum() + parameters[3].leaf.sum());
    sync.begin_last_backward();
    loss.backward();
    sync.finish(1);
    EXPECT_TRUE((dense == 2.0).all().item<bool>());
    EXPECT_TRUE((experts == 1.0).all().item<bool>());
  };
  comm::run_ranks(2, sum_on, {.timeout = kTimeout});
}

}  // namespace
}  // namespace collegium
