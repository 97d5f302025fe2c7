// SPDX-License-Identifier: Apache-2.0

// Padding is neither routed nor counted, and real tokens do not notice it.

#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "collegium/moe/router.h"
#include "tests/moe/cases.h"
#include "tests/moe/layer_weights.h"
#include "tests/moe/router_oracle.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::kWidth;
using test::random_tensor;
using test::relative_difference;

constexpr std::int64_t kLength = 5;
constexpr std::int64_t kReal = 2;  // sequences
constexpr std::int64_t kRows = kReal * kLength;

moe::TokenContext context_of(std::int64_t num_sequences) {
  moe::TokenContext context;
  context.num_sequences = num_sequences;
  context.sequence_length = kLength;
  context.seed = 11;
  context.training = true;
  return context;
}

struct Routed {
  moe::RouterOutput output;
  moe::RouterGradients gradients;
};

Routed route(const moe::MoeOptions& options, const at::Tensor& x_TD, const moe::TokenContext& context) {
  const moe::MoeWeights weights = test::make_weights(options);
  Routed routed{.output = moe::route(options, weights.router, x_TD, context), .gradients = {}};
  const moe::BalanceLoss balance = test::balance_of(options, routed.output.statistics);
  const at::Tensor& weights_TK = routed.output.routing.weights_TK;
  const at::Tensor grad_TK = random_tensor("grad", weights_TK.sizes());
  routed.gradients = moe::route_backward(*routed.output.state, grad_TK, balance.layers[0], {});
  return routed;
}

class PaddedVariant : public testing::TestWithParam<test::MoeCase> {};

// One group of two sequences, beside one of the same two and a third that is padding, larger than all others.
TEST_P(PaddedVariant, real_tokens_do_not_notice_it) {
  moe::MoeOptions options = test::base_options();
  GetParam().change(options);
  options.capacity.drop_policy = moe::DropPolicy::kNone;  // a capacity is a share of all positions
  if (options.router.renormalize == moe::Renormalize::kAfterDrop)
    options.router.renormalize = moe::Renormalize::kBeforeDrop;
  const at::Tensor padded_TD = random_tensor("x", {(kReal + 1) * kLength, kWidth});
  padded_TD.narrow(0, kRows, kLength).mul_(9.0);
  options.capacity.group_sequences = kReal;
  const Routed alone = route(options, padded_TD.narrow(0, 0, kRows), context_of(kReal));
  moe::TokenContext context = context_of(kReal + 1);
  context.padding_T = at::zeros({context.num_tokens()}, at::kBool);
  context.padding_T.narrow(0, kRows, kLength).fill_(true);
  options.capacity.group_sequences = kReal + 1;
  const Routed padded = route(options, padded_TD, context);

  const moe::Routing& routing = padded.output.routing;
  EXPECT_TRUE(at::equal(routing.expert_ids_TK.narrow(0, 0, kRows), alone.output.routing.expert_ids_TK));
  EXPECT_TRUE((routing.expert_ids_TK.narrow(0, kRows, kLength) == -1).all().item<bool>());
  const double tolerance = 100 * test::bound(at::kDouble, kWidth + kRows);
  EXPECT_LE(relative_difference(routing.weights_TK.narrow(0, 0, kRows), alone.output.routing.weights_TK),
            tolerance);
  EXPECT_LE(relative_difference(padded.gradients.gate_ED, alone.gradients.gate_ED), tolerance);
  EXPECT_LE(relative_difference(padded.gradients.x_TD.narrow(0, 0, kRows), alone.gradients.x_TD), tolerance);
  EXPECT_EQ(padded.gradients.x_TD.narrow(0, kRows, kLength).abs().sum().item<double>(), 0.0);

  const moe::RouterStatistics& statistics = padded.output.statistics;
  EXPECT_EQ(statistics.num_tokens_B[kReal].item<std::int64_t>(), 0);
  EXPECT_EQ(statistics.choice_counts_BE[kReal].sum().item<std::int64_t>(), 0);
  EXPECT_EQ(statistics.prob_sums_BE[kReal].abs().sum().item<double>(), 0.0);
  const double largest = alone.output.statistics.max_abs_logit;
  EXPECT_NEAR(statistics.max_abs_logit, largest, tolerance * largest);
}

INSTANTIATE_TEST_SUITE_P(All, PaddedVariant, testing::ValuesIn(test::moe_cases()),
                         [](const auto& variant) { return variant.param.name; });

}  // namespace
}  // namespace collegium
