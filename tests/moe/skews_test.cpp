// SPDX-License-Identifier: Apache-2.0

// The routings of benchmarks have the shares that their documentation promises, whatever the sizes.

#include "collegium/moe/skews.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

namespace collegium {
namespace {

using moe::Skew;
using moe::SkewShape;

// So many that an incomplete turn does not show.
constexpr std::int64_t kTokens = std::int64_t{4} * 63 * 64;

const std::vector<SkewShape> kShapes = {
    {.num_experts = 8, .top_k = 2, .num_ranks = 1},  {.num_experts = 8, .top_k = 2, .num_ranks = 2},
    {.num_experts = 8, .top_k = 2, .num_ranks = 4},  {.num_experts = 9, .top_k = 2, .num_ranks = 3},
    {.num_experts = 64, .top_k = 8, .num_ranks = 4}, {.num_experts = 12, .top_k = 3, .num_ranks = 2},
    {.num_experts = 12, .top_k = 1, .num_ranks = 4}};

// Each expert's share of all slots.
std::vector<double> shares_of(Skew skew, const SkewShape& shape, std::int64_t step = 1) {
  const at::Tensor ids_TK = moe::skewed_ids_TK(skew, shape, step, 0, kTokens);
  std::vector<double> shares(static_cast<std::size_t>(shape.num_experts), 0.0);
  const auto* ids = ids_TK.const_data_ptr<std::int32_t>();
  for (std::int64_t token = 0; token < kTokens; ++token, ids += shape.top_k) {
    EXPECT_EQ(static_cast<std::int64_t>(std::set<std::int32_t>(ids, ids + shape.top_k).size()), shape.top_k);
    for (std::int64_t k = 0; k < shape.top_k; ++k)
      shares[static_cast<std::size_t>(ids[k])] += 1.0 / static_cast<double>(kTokens * shape.top_k);
  }
  return shares;
}

std::vector<double> shares_of_ranks(Skew skew, const SkewShape& shape) {
  const moe::ExpertPlacement placement{.num_experts = shape.num_experts, .num_ranks = shape.num_ranks};
  std::vector<double> ranks(static_cast<std::size_t>(shape.num_ranks), 0.0);
  const std::vector<double> experts = shares_of(skew, shape);
  for (std::int64_t e = 0; e < shape.num_experts; ++e)
    ranks[static_cast<std::size_t>(placement.rank_of(e))] += experts[static_cast<std::size_t>(e)];
  return ranks;
}

// An incomplete last turn gives some of a pool's experts one slot more.
double one_slot_of(const SkewShape& shape) {
  return 1.5 / static_cast<double>(kTokens * shape.top_k) * static_cast<double>(shape.num_experts);
}

TEST(Skews, balanced_gives_every_expert_as_much) {
  for (const SkewShape& shape : kShapes) {
    for (const double share : shares_of(Skew::kBalanced, shape))
      EXPECT_NEAR(share, 1.0 / static_cast<double>(shape.num_experts), one_slot_of(shape));
  }
}

TEST(Skews, a_hot_expert_is_chosen_by_every_second_token_and_the_others_are_balanced) {
  for (const SkewShape& shape : kShapes) {
    for (const auto& [skew, hot] : {std::pair{Skew::kHotExperts, 0}, {Skew::kRotating, 5}}) {
      const std::vector<double> shares = shares_of(skew, shape, /*step=*/5);
      const double of_hot = 0.5 / static_cast<double>(shape.top_k);
      for (std::int64_t e = 0; e < shape.num_experts; ++e) {
        const double expected =
            e == hot ? of_hot : (1.0 - of_hot) / static_cast<double>(shape.num_experts - 1);
        EXPECT_NEAR(shares[static_cast<std::size_t>(e)], expected, one_slot_of(shape)) << "expert " << e;
      }
    }
  }
}

TEST(Skews, a_hot_rank_gets_three_quarters_and_its_part_of_the_rest) {
  for (const SkewShape& shape : kShapes) {
    if (shape.num_ranks == 1 || shape.top_k > shape.num_experts / shape.num_ranks) continue;
    const std::vector<double> ranks = shares_of_ranks(Skew::kHotRank, shape);
    const double rest = 0.25 / shape.num_ranks;
    EXPECT_NEAR(ranks[0], 0.75 + rest, one_slot_of(shape));
    for (std::size_t rank = 1; rank < ranks.size(); ++rank)
      EXPECT_NEAR(ranks[rank], rest, one_slot_of(shape));
  }
}

TEST(Skews, spread_hot_experts_differ_from_the_others_and_ranks_do_not) {
  for (const SkewShape& shape : kShapes) {
    const moe::ExpertPlacement placement{.num_experts = shape.num_experts, .num_ranks = shape.num_ranks};
    const double taken = std::min<double>(static_cast<double>(shape.top_k), shape.num_ranks);
    const double hot = 0.5 * taken / static_cast<double>(shape.top_k);  // of all slots
    const std::vector<double> experts = shares_of(Skew::kSpreadHot, shape);
    for (std::int64_t e = 0; e < shape.num_experts; ++e) {
      const bool is_hot = placement.first(placement.rank_of(e)) == e;
      const double expected = is_hot ? hot / shape.num_ranks
                                     : (1.0 - hot) / static_cast<double>(shape.num_experts - shape.num_ranks);
      EXPECT_NEAR(experts[static_cast<std::size_t>(e)], expected, one_slot_of(shape)) << "expert " << e;
    }
    for (const double share : shares_of_ranks(Skew::kSpreadHot, shape))
      EXPECT_NEAR(share, 1.0 / shape.num_ranks, one_slot_of(shape));
  }
}

TEST(Skews, zero_load_leaves_the_last_rank_out_and_a_burst_all_but_k_experts) {
  for (const SkewShape& shape : kShapes) {
    if (shape.num_ranks > 1) {
      const std::vector<double> ranks = shares_of_ranks(Skew::kZeroLoad, shape);
      EXPECT_EQ(ranks.back(), 0.0);
      for (std::size_t rank = 0; rank + 1 < ranks.size(); ++rank)
        EXPECT_NEAR(ranks[rank], 1.0 / (shape.num_ranks - 1), one_slot_of(shape));
    }
    const std::vector<double> burst = shares_of(Skew::kBurst, shape, /*step=*/8);
    for (std::int64_t e = 0; e < shape.num_experts; ++e) {
      const double expected = e < shape.top_k ? 1.0 / static_cast<double>(shape.top_k) : 0.0;
      EXPECT_NEAR(burst[static_cast<std::size_t>(e)], expected, one_slot_of(shape));
    }
  }
}

TEST(Skews, ids_depend_on_the_global_token_alone) {
  for (const auto& [name, skew] : EnumNames<Skew>::names) {
    const SkewShape shape{.num_experts = 12, .top_k = 3, .num_ranks = 2};
    const at::Tensor whole = moe::skewed_ids_TK(skew, shape, 2, 0, 100);
    const at::Tensor parts =
        at::cat({moe::skewed_ids_TK(skew, shape, 2, 0, 37), moe::skewed_ids_TK(skew, shape, 2, 37, 63)});
    EXPECT_TRUE(at::equal(whole, parts)) << name;
  }
}

TEST(Skews, ragged_sources_bring_all_tokens_unevenly) {
  EXPECT_EQ(moe::skewed_shares(Skew::kRaggedSource, 1600, 4),
            (std::vector<std::int64_t>{100, 300, 500, 700}));
  EXPECT_EQ(moe::skewed_shares(Skew::kBalanced, 10, 4), (std::vector<std::int64_t>{2, 3, 2, 3}));
}

}  // namespace
}  // namespace collegium
