// SPDX-License-Identifier: Apache-2.0
#pragma once

// The router and its losses against the plain loops of moe/reference/.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "collegium/moe/balance.h"
#include "collegium/moe/layer.h"
#include "collegium/moe/reference/router_reference.h"
#include "tests/support/tensors.h"

namespace collegium::test {

inline moe::reference::RouterInputs reference_inputs(const moe::MoeWeights& w, const at::Tensor& x_TD) {
  moe::reference::RouterInputs inputs{
      .x_TD = to_matrix(x_TD), .gate_ED = to_matrix(w.router.gate_ED), .noise_ED = {}, .bias_E = {}};
  if (w.router.noise_ED.defined()) inputs.noise_ED = to_matrix(w.router.noise_ED);
  if (w.router.expert_bias_E.defined()) {
    const auto* bias = w.router.expert_bias_E.const_data_ptr<double>();
    inputs.bias_E.assign(bias, bias + w.router.expert_bias_E.numel());
  }
  return inputs;
}

/// Of one layer on one rank.
inline moe::BalanceLoss balance_of(const moe::MoeOptions& o, const moe::RouterStatistics& statistics) {
  const moe::RouterTotals totals(statistics);
  const std::vector<moe::LayerStatistics> layers = {{.local = statistics, .totals = totals}};
  return moe::balance_loss(o, layers);
}

/// Sets all coefficients of the balance losses to 1.
struct EveryCoefficient {
  template <class T>
  void operator()(const char* /*key*/, T& value, const char* /*doc*/) {
    if constexpr (std::is_same_v<T, double>) value = 1.0;
  }
};

/// Choices, drops, weights and every balance loss, in float64.
inline void expect_router_equals_oracle(const moe::MoeOptions& options, const moe::MoeWeights& weights,
                                        const at::Tensor& x_TD, const moe::TokenContext& context) {
  const moe::RouterOutput ours = moe::route(options, weights.router, x_TD, context);
  const auto oracle = moe::reference::route(options, reference_inputs(weights, x_TD), context);
  const double tolerance = 100 * bound(at::kDouble, x_TD.size(1) + options.num_experts);
  std::int64_t dropped = 0;
  double entropy = 0.0;
  for (std::int64_t t = 0; t < context.num_tokens(); ++t) {
    const auto& token = oracle[static_cast<std::size_t>(t)];
    for (const double p : token.probabilities) entropy -= p > 0.0 ? p * std::log(p) : 0.0;
    for (std::size_t k = 0; k < token.chosen.size(); ++k) {
      const auto slot = static_cast<std::int64_t>(k);
      EXPECT_EQ(ours.routing.chosen_ids_TK[t][slot].item<int>(), token.chosen[k])
          << "token " << t << " choice " << k;
      EXPECT_EQ(ours.routing.expert_ids_TK[t][slot].item<int>(), token.kept[k] ? token.chosen[k] : -1)
          << "token " << t << " choice " << k;
      EXPECT_NEAR(ours.routing.weights_TK[t][slot].item<double>(), token.weights[k], tolerance);
      dropped += token.over_capacity[k] ? 1 : 0;
    }
  }
  EXPECT_EQ(ours.statistics.num_dropped, dropped);
  EXPECT_NEAR(ours.statistics.entropy_B.sum().item<double>(), entropy,
              tolerance * static_cast<double>(context.num_tokens()));
  moe::MoeOptions all = options;
  EveryCoefficient set;
  describe(set, all.balance);
  const moe::BalanceLoss losses = balance_of(all, ours.statistics);
  for (const auto& [name, value] : moe::reference::losses(options, oracle, context)) {
    EXPECT_NEAR(losses.terms.at(name), value, 100 * tolerance * std::max(1.0, std::abs(value))) << name;
  }
}

}  // namespace collegium::test
