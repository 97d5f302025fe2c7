// SPDX-License-Identifier: Apache-2.0

// Every variant of cases.h where it is easiest to be wrong: one token, sequences of one token, and tokens and
// experts that are equal, so that every decision is a tie.

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <gtest/gtest.h>

#include "collegium/moe/balance.h"
#include "collegium/moe/layer.h"
#include "tests/moe/cases.h"
#include "tests/moe/layer_weights.h"
#include "tests/moe/router_oracle.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::kWidth;
using test::random_tensor;

moe::TokenContext context_of(std::int64_t num_sequences, std::int64_t length) {
  moe::TokenContext context;
  context.num_sequences = num_sequences;
  context.sequence_length = length;
  context.first_sequence = 2;
  context.seed = 5;
  context.step = 2;
  context.layer = 1;
  context.training = true;
  return context;
}

class DegenerateVariant : public testing::TestWithParam<test::MoeCase> {
 protected:
  void SetUp() override {
    options_ = test::base_options();
    GetParam().change(options_);
  }

  double total_loss(const moe::MoeWeights& w, const at::Tensor& x_TD, const moe::TokenContext& context,
                    bool backward) const {
    auto run = std::make_shared<moe::LayerRun>();
    run->context = context;
    const auto dispatcher = moe::make_local_dispatcher(options_.num_experts);
    const at::Tensor y_TD = moe::moe_layer(options_, w, {.dispatcher = dispatcher, .overlap = {}}, x_TD, run);
    const at::Tensor loss = (y_TD * random_tensor("g", y_TD.sizes())).sum();
    const moe::BalanceLoss balance = test::balance_of(options_, run->statistics);
    run->statistics_gradient = balance.layers[0];
    if (backward) loss.backward();
    return loss.item<double>() + balance.total;
  }

  void expect_gradients_equal_differences(const moe::TokenContext& context) const {
    moe::MoeWeights weights = test::make_weights(options_);
    at::Tensor x_TD = random_tensor("x", {context.num_tokens(), kWidth});
    const auto tensors = test::differentiable(weights, x_TD);
    for (const auto& [name, tensor] : tensors) tensor->requires_grad_(true);
    total_loss(weights, x_TD, context, /*backward=*/true);
    // As in layer_test.cpp: truncation and rounding are both about 4e-11 here, times third derivatives.
    const double h = std::cbrt(test::epsilon(at::kDouble));
    constexpr double kTolerance = 1e-7;
    const at::NoGradGuard no_grad;
    for (const auto& [name, tensor] : tensors) {
      at::Tensor direction = random_tensor("direction/" + name, tensor->sizes());
      direction = direction / direction.norm();
      const at::Tensor original = tensor->clone();
      tensor->copy_(original + h * direction);
      const double above = total_loss(weights, x_TD, context, false);
      tensor->copy_(original - h * direction);
      const double below = total_loss(weights, x_TD, context, false);
      tensor->copy_(original);
      const double analytic = (tensor->grad() * direction).sum().item<double>();
      EXPECT_NEAR(analytic, (above - below) / (2 * h),
                  kTolerance * std::max(1.0, tensor->grad().norm().item<double>()))
          << name;
    }
  }

  moe::MoeOptions options_;
};

TEST_P(DegenerateVariant, one_token) {
  const moe::TokenContext context = context_of(options_.capacity.group_sequences, 1);
  test::expect_router_equals_oracle(options_, test::make_weights(options_),
                                    random_tensor("x", {context.num_tokens(), kWidth}), context);
  expect_gradients_equal_differences(context);
}

TEST_P(DegenerateVariant, sequences_of_one_token) {
  const moe::TokenContext context = context_of(6, 1);
  test::expect_router_equals_oracle(options_, test::make_weights(options_),
                                    random_tensor("x", {context.num_tokens(), kWidth}), context);
  expect_gradients_equal_differences(context);
}

TEST_P(DegenerateVariant, all_experts_and_tokens_tie) {
  const moe::TokenContext context = context_of(4, 5);
  moe::MoeWeights weights = test::make_weights(options_);
  weights.router.gate_ED.zero_();
  if (weights.router.expert_bias_E.defined()) weights.router.expert_bias_E.zero_();
  test::expect_router_equals_oracle(options_, weights, random_tensor("x", {context.num_tokens(), kWidth}),
                                    context);
}

TEST_P(DegenerateVariant, pairs_of_experts_and_tokens_tie) {
  // Experts e and e + E/2 are equal, and so are tokens t and t + 3. A logit is one product, so that no order
  // of summation can tell equal experts apart.
  const moe::TokenContext context = context_of(4, 6);
  moe::MoeWeights weights = test::make_weights(options_);
  const std::int64_t half = (options_.num_experts + 1) / 2;
  const at::Tensor gate = at::eye(half, kWidth, at::kDouble) * at::arange(1, half + 1).unsqueeze(1);
  weights.router.gate_ED = at::cat({gate, gate}).narrow(0, 0, options_.num_experts).contiguous();
  const at::Tensor rows = random_tensor("rows", {3, kWidth});
  const at::Tensor x_TD = rows.repeat({context.num_tokens() / 3, 1});
  test::expect_router_equals_oracle(options_, weights, x_TD, context);
}

INSTANTIATE_TEST_SUITE_P(All, DegenerateVariant, testing::ValuesIn(test::moe_cases()),
                         [](const auto& variant) { return variant.param.name; });

}  // namespace
}  // namespace collegium
