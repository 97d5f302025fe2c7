// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/monitors.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "collegium/moe/router.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using testing::DoubleNear;
using testing::ElementsAre;

// Four experts, two choices a token. Worked by hand.
moe::MoeOptions four_experts() {
  moe::MoeOptions options;
  options.num_experts = 4;
  options.top_k = 2;
  options.ffn_size = 1;
  return options;
}

moe::RouterStatistics statistics_of(std::int64_t num_tokens, const at::Tensor& choices_E,
                                    const at::Tensor& probs_E, const at::Tensor& importance_E, double entropy,
                                    std::int64_t dropped) {
  moe::RouterStatistics s;
  s.num_tokens_B = at::full({1}, num_tokens, at::kLong);
  s.choice_counts_BE = choices_E.to(at::kLong).unsqueeze(0);
  s.first_counts_BE = at::zeros({1, 4}, at::kLong);
  s.prob_sums_BE = probs_E.to(at::kDouble).unsqueeze(0);
  s.importance_BE = importance_E.to(at::kDouble).unsqueeze(0);
  s.squared_lse_B = at::zeros({1}, at::kDouble);
  s.entropy_B = at::full({1}, entropy, at::kDouble);
  s.num_dropped = dropped;
  return s;
}

TEST(Monitors, known_values_over_two_micro_steps) {
  moe::MonitorSums sums(4);
  // 5 tokens, then 3: 16 choices, 4 a mean expert.
  sums.add(moe::RouterTotals(statistics_of(5, at::tensor({5, 3, 2, 0}), at::tensor({2.0, 1.5, 1.0, 0.5}),
                                           at::tensor({3.0, 1.0, 1.0, 0.0}), 5 * std::log(4.0), 1)),
           3.5);
  sums.add(moe::RouterTotals(statistics_of(3, at::tensor({3, 3, 0, 0}), at::tensor({2.0, 0.5, 0.25, 0.25}),
                                           at::tensor({2.0, 1.0, 0.0, 0.0}), 0.0, 3)),
           2.5);
  const moe::LayerMonitors m = sums.monitors(four_experts());
  EXPECT_THAT(m.load, ElementsAre(2.0, 1.5, 0.5, 0.0));
  EXPECT_THAT(m.importance, ElementsAre(2.5, 1.0, 0.5, 0.0));
  EXPECT_DOUBLE_EQ(m.load_cv, std::sqrt((1.0 + 0.25 + 0.25 + 1.0) / 4));
  // E sum_e (c_e / 16) (P_e / 8), P = (4, 2, 1.25, 0.75).
  EXPECT_DOUBLE_EQ(m.normalized_balance, 4 * (8 * 4.0 + 6 * 2.0 + 2 * 1.25) / (16 * 8));
  EXPECT_DOUBLE_EQ(m.max_violation, 1.0);
  EXPECT_DOUBLE_EQ(m.router_entropy, 5.0 / 8);
  EXPECT_DOUBLE_EQ(m.drop_rate, 4.0 / 16);
  EXPECT_EQ(m.dead_experts, 1);
  EXPECT_DOUBLE_EQ(m.max_abs_logit, 3.5);
}

TEST(Monitors, balanced_layer_is_one_and_zero) {
  moe::MonitorSums sums(4);
  sums.add(moe::RouterTotals(statistics_of(8, at::full({4}, 4), at::full({4}, 2.0), at::full({4}, 2.0),
                                           8 * std::log(4.0), 0)),
           0.0);
  const moe::LayerMonitors m = sums.monitors(four_experts());
  EXPECT_THAT(m.load, ElementsAre(1.0, 1.0, 1.0, 1.0));
  EXPECT_DOUBLE_EQ(m.load_cv, 0.0);
  EXPECT_DOUBLE_EQ(m.normalized_balance, 1.0);
  EXPECT_DOUBLE_EQ(m.max_violation, 0.0);
  EXPECT_DOUBLE_EQ(m.router_entropy, 1.0);
  EXPECT_EQ(m.dead_experts, 0);
}

TEST(Monitors, nothing_seen_gives_zeros) {
  const moe::LayerMonitors m = moe::MonitorSums(4).monitors(four_experts());
  EXPECT_EQ(m.normalized_balance, 0.0);
  EXPECT_EQ(m.drop_rate, 0.0);
  EXPECT_TRUE(m.load.empty());
}

// What the router counts for them, from logits (2, 1, 0, -1) of one token and (-1, 0, 1, 2) of another.
TEST(Monitors, router_counts_logits_entropy_and_drops) {
  moe::MoeOptions options = four_experts();
  options.capacity = {.drop_policy = moe::DropPolicy::kPosition, .factor = "0.5", .min_capacity = 1};
  moe::TokenContext context;
  context.num_sequences = 1;
  context.sequence_length = 3;
  context.training = true;
  const at::Tensor x_TD = at::tensor({1.0, 0.0, 0.0, 1.0, 1.0, 0.0}, at::kDouble).view({3, 2});
  const moe::RouterWeights weights{
      .gate_ED = at::tensor({2.0, -1.0, 1.0, 0.0, 0.0, 1.0, -1.0, 2.0}, at::kDouble).view({4, 2}),
      .noise_ED = {},
      .expert_bias_E = {}};
  const moe::RouterStatistics s = moe::route(options, weights, x_TD, context).statistics;
  // The third token wants what the first took; every expert has one place.
  EXPECT_EQ(s.num_dropped, 2);
  EXPECT_EQ(s.max_abs_logit, 2.0);
  double entropy = 0.0;
  double sum = 0.0;
  for (const double z : {2.0, 1.0, 0.0, -1.0}) sum += std::exp(z);
  for (const double z : {2.0, 1.0, 0.0, -1.0}) entropy -= std::exp(z) / sum * (z - std::log(sum));
  EXPECT_THAT(s.entropy_B.item<double>(), DoubleNear(3 * entropy, test::bound(at::kDouble, 100)));
}

TEST(Monitors, second_expert_that_is_not_wanted_is_no_drop) {
  moe::MoeOptions options = four_experts();
  options.router.noise = moe::Noise::kRandomSecondExpert;
  moe::TokenContext context;
  context.num_sequences = 1;
  context.sequence_length = 64;
  context.training = true;
  const moe::RouterWeights weights{
      .gate_ED = 3.0 * test::random_tensor("gate", {4, 5}), .noise_ED = {}, .expert_bias_E = {}};
  const moe::RouterOutput output = moe::route(options, weights, test::random_tensor("x", {64, 5}), context);
  EXPECT_LT((output.routing.expert_ids_TK >= 0).sum().item<std::int64_t>(), 128);
  EXPECT_EQ(output.statistics.num_dropped, 0);
}

}  // namespace
}  // namespace collegium
