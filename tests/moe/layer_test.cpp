// SPDX-License-Identifier: Apache-2.0

// Every variant of cases.h against the plain-loop oracle and against numerical gradients, in float64.

#include "collegium/moe/layer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/moe/balance.h"
#include "collegium/moe/reference/router_reference.h"
#include "collegium/moe/router_state.h"
#include "tests/moe/cases.h"
#include "tests/moe/layer_weights.h"
#include "tests/moe/router_oracle.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

using test::balance_of;
using test::differentiable;
using test::kWidth;
using test::make_weights;
using test::random_tensor;
using test::reference_inputs;
using test::relative_difference;

constexpr std::int64_t kSequences = 4;
constexpr std::int64_t kLength = 5;

moe::TokenContext training_context() {
  moe::TokenContext context;
  context.num_sequences = kSequences;
  context.sequence_length = kLength;
  context.first_sequence = 2;
  context.seed = 11;
  context.step = 3;
  context.layer = 1;
  context.training = true;
  return context;
}

class MoeVariant : public testing::TestWithParam<test::MoeCase> {
 protected:
  void SetUp() override {
    options_ = test::base_options();
    GetParam().change(options_);
    moe::validate(options_, "moe", /*causal=*/true, /*training=*/true);
  }
  moe::MoeOptions options_;
};

TEST_P(MoeVariant, router_and_losses_equal_the_plain_loops) {
  const moe::TokenContext context = training_context();
  const at::Tensor x_TD = random_tensor("x", {context.num_tokens(), kWidth});
  test::expect_router_equals_oracle(options_, make_weights(options_), x_TD, context);
}

// One token through its experts, by loops.
std::vector<double> oracle_output(const moe::MoeOptions& o, const moe::MoeWeights& w,
                                  const moe::reference::TokenRouting& token, const std::vector<double>& x) {
  std::vector<double> y(x.size(), 0.0);
  for (std::size_t k = 0; k < token.chosen.size(); ++k) {
    if (!token.kept[k]) continue;
    const auto expert = ops::reference::expert(test::to_matrix(w.gate_up_LGD[token.chosen[k]]),
                                               test::to_matrix(w.down_LDF[token.chosen[k]]), x);
    for (std::size_t d = 0; d < y.size(); ++d) y[d] += token.weights[k] * expert[d];
  }
  if (o.shared_expert.kind == moe::SharedExpert::kNone) return y;
  const auto shared =
      ops::reference::expert(test::to_matrix(w.shared_gate_up_GD), test::to_matrix(w.shared_down_DF), x);
  double routed_factor = 1.0;
  double shared_factor = 1.0;
  if (w.shared_gate_1D.defined()) {
    shared_factor =
        1.0 / (1.0 + std::exp(-ops::reference::matrix_vector(test::to_matrix(w.shared_gate_1D), x)[0]));
  }
  if (w.shared_mix_2D.defined()) {
    const auto z = ops::reference::matrix_vector(test::to_matrix(w.shared_mix_2D), x);
    routed_factor = 1.0 / (1.0 + std::exp(z[1] - z[0]));
    shared_factor = 1.0 - routed_factor;
  }
  for (std::size_t d = 0; d < y.size(); ++d) y[d] = routed_factor * y[d] + shared_factor * shared[d];
  return y;
}

at::Tensor run_layer(const moe::MoeOptions& o, const moe::MoeWeights& w, const at::Tensor& x_TD,
                     const std::shared_ptr<moe::LayerRun>& run) {
  const auto dispatcher = moe::make_local_dispatcher(o.num_experts);
  return moe::moe_layer(o, w, {.dispatcher = dispatcher, .overlap = {}}, x_TD, run);
}

TEST_P(MoeVariant, layer_output_equals_the_plain_loops) {
  auto run = std::make_shared<moe::LayerRun>();
  run->context = training_context();
  const at::Tensor x_TD = random_tensor("x", {run->context.num_tokens(), kWidth});
  const moe::MoeWeights weights = make_weights(options_);
  const at::NoGradGuard no_grad;
  const at::Tensor y_TD = run_layer(options_, weights, x_TD, run);
  const auto oracle = moe::reference::route(options_, reference_inputs(weights, x_TD), run->context);
  at::Tensor expected = at::empty_like(y_TD);
  for (std::int64_t t = 0; t < x_TD.size(0); ++t) {
    std::vector<double> x(x_TD[t].const_data_ptr<double>(), x_TD[t].const_data_ptr<double>() + kWidth);
    if (options_.router.noise == moe::Noise::kJitterInput) {
      const RandomStream jitter(11, "router/jitter", 3, 1);
      const auto token = static_cast<std::uint64_t>(run->context.first_token() + t);
      for (std::size_t d = 0; d < x.size(); ++d) x[d] *= 0.7 + 0.6 * jitter.uniform(token, d);
    }
    const auto y = oracle_output(options_, weights, oracle[static_cast<std::size_t>(t)], x);
    expected[t] = at::tensor(y, at::kDouble);
  }
  EXPECT_LE(relative_difference(y_TD, expected), 10 * test::bound(at::kDouble, kWidth * options_.ffn_size));
}

// sum(g * y) + balance losses, and, with gradients wanted, backward().
double total_loss(const moe::MoeOptions& o, const moe::MoeWeights& w, const at::Tensor& x, bool backward) {
  auto run = std::make_shared<moe::LayerRun>();
  run->context = training_context();
  const at::Tensor y = run_layer(o, w, x, run);
  const at::Tensor loss = (y * random_tensor("g", y.sizes())).sum();
  const moe::BalanceLoss balance = balance_of(o, run->statistics);
  run->statistics_gradient = balance.layers[0];
  if (backward) loss.backward();
  return loss.item<double>() + balance.total;
}

TEST_P(MoeVariant, gradients_equal_central_differences) {
  moe::MoeWeights weights = make_weights(options_);
  at::Tensor x = random_tensor("x", {kSequences * kLength, kWidth});
  const auto tensors = differentiable(weights, x);
  for (const auto& [name, tensor] : tensors) tensor->requires_grad_(true);
  total_loss(options_, weights, x, /*backward=*/true);
  // The cube root of epsilon balances truncation (h^2) against rounding (epsilon / h); both are then about
  // 4e-11, times third derivatives of the loss along a unit direction, which reach some hundreds here.
  const double h = std::cbrt(test::epsilon(at::kDouble));
  constexpr double kTolerance = 1e-7;
  for (const auto& [name, tensor] : tensors) {
    at::Tensor direction = random_tensor("direction/" + name, tensor->sizes());
    direction = direction / direction.norm();
    const at::NoGradGuard no_grad;
    const at::Tensor original = tensor->clone();
    tensor->copy_(original + h * direction);
    const double above = total_loss(options_, weights, x, false);
    tensor->copy_(original - h * direction);
    const double below = total_loss(options_, weights, x, false);
    tensor->copy_(original);
    ASSERT_TRUE(tensor->grad().defined()) << name;
    const double analytic = (tensor->grad() * direction).sum().item<double>();
    const double numeric = (above - below) / (2 * h);
    EXPECT_NEAR(analytic, numeric, kTolerance * std::max(1.0, tensor->grad().norm().item<double>())) << name;
  }
}

TEST_P(MoeVariant, decisions_do_not_depend_on_how_sequences_are_spread) {
  const moe::MoeWeights weights = make_weights(options_);
  moe::TokenContext whole = training_context();
  const at::Tensor x_TD = random_tensor("x", {whole.num_tokens(), kWidth});
  const moe::Routing all = moe::route(options_, weights.router, x_TD, whole).routing;
  for (std::int64_t half = 0; half < 2; ++half) {
    moe::TokenContext part = whole;
    part.num_sequences = kSequences / 2;
    part.first_sequence += half * part.num_sequences;
    const std::int64_t begin = half * part.num_tokens();
    const moe::Routing routing =
        moe::route(options_, weights.router, x_TD.narrow(0, begin, part.num_tokens()), part).routing;
    EXPECT_TRUE(at::equal(routing.expert_ids_TK, all.expert_ids_TK.narrow(0, begin, part.num_tokens())));
  }
}

TEST_P(MoeVariant, a_rank_without_tokens_takes_part) {
  auto run = std::make_shared<moe::LayerRun>();
  run->context = training_context();
  run->context.num_sequences = 0;
  moe::MoeWeights weights = make_weights(options_);
  at::Tensor x = at::zeros({0, kWidth}, at::kDouble);
  for (const auto& [name, tensor] : differentiable(weights, x)) tensor->requires_grad_(true);
  const at::Tensor y = run_layer(options_, weights, x, run);
  EXPECT_EQ(y.size(0), 0);
  EXPECT_EQ(balance_of(options_, run->statistics).total, 0.0);
  y.sum().backward();
  EXPECT_EQ(weights.gate_up_LGD.grad().abs().sum().item<double>(), 0.0);
  EXPECT_EQ(weights.router.gate_ED.grad().abs().sum().item<double>(), 0.0);
}

INSTANTIATE_TEST_SUITE_P(All, MoeVariant, testing::ValuesIn(test::moe_cases()),
                         [](const auto& variant) { return variant.param.name; });

TEST(MoeLayer, ties_go_to_the_lower_expert) {
  const moe::MoeOptions options = test::base_options();
  moe::TokenContext context = training_context();
  const moe::RouterWeights weights{
      .gate_ED = at::zeros({options.num_experts, kWidth}, at::kDouble), .noise_ED = {}, .expert_bias_E = {}};
  const auto routing =
      moe::route(options, weights, random_tensor("x", {context.num_tokens(), kWidth}), context).routing;
  EXPECT_TRUE((routing.expert_ids_TK.select(1, 0) == 0).all().item<bool>());
  EXPECT_TRUE((routing.expert_ids_TK.select(1, 1) == 1).all().item<bool>());
}

TEST(MoeLayer, token_without_any_expert_passes_by_the_residual) {
  const moe::MoeOptions options = test::base_options();
  auto run = std::make_shared<moe::LayerRun>();
  run->context = training_context();
  run->replayed_ids_TK = at::full({run->context.num_tokens(), options.top_k}, -1, at::kInt);
  const at::Tensor y =
      run_layer(options, make_weights(options), random_tensor("x", {run->context.num_tokens(), kWidth}), run);
  EXPECT_EQ(y.abs().sum().item<double>(), 0.0);
  EXPECT_TRUE((run->routing.expert_ids_TK == -1).all().item<bool>());
}

TEST(MoeLayer, all_tokens_to_one_expert) {
  moe::MoeOptions options = test::base_options();
  options.top_k = 1;
  options.router.renormalize = moe::Renormalize::kNever;
  auto run = std::make_shared<moe::LayerRun>();
  run->context = training_context();
  run->replayed_ids_TK = at::full({run->context.num_tokens(), 1}, 4, at::kInt);
  moe::MoeWeights weights = make_weights(options);
  weights.gate_up_LGD.requires_grad_(true);
  run_layer(options, weights, random_tensor("x", {run->context.num_tokens(), kWidth}), run).sum().backward();
  EXPECT_TRUE((run->routing.expert_ids_TK == 4).all().item<bool>());
  for (std::int64_t expert = 0; expert < options.num_experts; ++expert) {
    EXPECT_EQ(weights.gate_up_LGD.grad()[expert].abs().sum().item<double>() > 0.0, expert == 4);
  }
}

TEST(Router, keeps_logits_only_for_backward_passes_that_read_them) {
  const auto keeps = [](const std::function<void(moe::MoeOptions&)>& change) {
    moe::MoeOptions options = test::base_options();
    change(options);
    const at::Tensor x_TD = random_tensor("x", {kSequences * kLength, kWidth});
    return moe::route(options, make_weights(options).router, x_TD, training_context())
        .state->clean_TE.defined();
  };
  EXPECT_FALSE(keeps([](moe::MoeOptions& o) { o.balance.z_loss = 0.1; }));
  EXPECT_TRUE(keeps([](moe::MoeOptions& o) { o.router.score = moe::ScoreFunction::kSigmoid; }));
  EXPECT_TRUE(keeps([](moe::MoeOptions& o) { o.router.noise = moe::Noise::kNoisyTopK; }));
}

TEST(MoeLayer, low_precision_is_within_its_bound_and_reruns_are_bit_identical) {
  const moe::MoeOptions options = test::base_options();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const moe::MoeWeights weights = make_weights(options, dtype);
    const at::Tensor x = random_tensor("x", {kSequences * kLength, kWidth}, dtype);
    auto run = std::make_shared<moe::LayerRun>();
    run->context = training_context();
    const at::Tensor y = run_layer(options, weights, x, run);
    auto again = std::make_shared<moe::LayerRun>();
    again->context = training_context();
    EXPECT_TRUE(at::equal(y, run_layer(options, weights, x, again)));
    // The same rounded numbers in float64, with the same experts.
    auto exact = std::make_shared<moe::LayerRun>();
    exact->context = training_context();
    exact->replayed_ids_TK = run->routing.chosen_ids_TK;
    moe::MoeWeights wide = weights;
    wide.router.gate_ED = weights.router.gate_ED.to(at::kDouble);
    wide.gate_up_LGD = weights.gate_up_LGD.to(at::kDouble);
    wide.down_LDF = weights.down_LDF.to(at::kDouble);
    const at::Tensor reference = run_layer(options, wide, x.to(at::kDouble), exact);
    // Rounded after each of: first GEMM, SwiGLU, second GEMM, combine; each GEMM sums in fp32.
    EXPECT_LE(relative_difference(y, reference), test::bound(dtype, 4) + test::bound(at::kFloat, 2 * kWidth));
  }
}

}  // namespace
}  // namespace collegium
