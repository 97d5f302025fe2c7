// SPDX-License-Identifier: Apache-2.0
#pragma once

// Balance losses. Each is a function of the layers' RouterTotals, summed over all ranks; what goes back to a
// layer is dLoss/dStatistics of this rank's tokens, so pooled forms and sums that are reduced late need no
// autograd.

#include <map>
#include <span>
#include <string>
#include <vector>

#include "collegium/moe/options.h"
#include "collegium/moe/router_totals.h"
#include "collegium/moe/routing.h"

namespace collegium::moe {

struct BalanceLoss {
  double total = 0.0;                   ///< sum of coefficient times loss, averaged over layers
  std::map<std::string, double> terms;  ///< by option name, without its coefficient, averaged over layers
  double normalized_balance = 0.0;      ///< E sum f P per layer, averaged: 1.0 = perfectly balanced
  std::vector<RouterStatisticsGradient> layers;  ///< d total / d statistics, one per layer
};

/// One layer of a micro-step.
struct LayerStatistics {
  const RouterStatistics& local;  ///< this rank's sequences
  const RouterTotals& totals;     ///< all ranks'
};

/// What     All balance losses with a coefficient, over the MoE layers of one micro-step. Values are those of
///          the whole micro-step, the same on all ranks; gradients are for this rank's tokens.
/// Math     docs/router.md has each formula, its scope and its source.
/// Order    A micro-step without tokens gives 0 and zero gradients.
BalanceLoss balance_loss(const MoeOptions& options, std::span<const LayerStatistics> layers);

/// What     Hugging Face's form: counts (not divided by K) and probabilities are pooled over all layers
///          before the product, E sum_e (C_e / (layers T)) (P_e / (layers T)). Returned without its
///          coefficient; `coefficient` times its gradient is added to `gradients` (empty = value only).
/// Dtype    and device of the gradients: `gradient_options`.
double hf_pooled_loss(const MoeOptions& options, std::span<const RouterTotals> layers, double coefficient,
                      std::span<RouterStatisticsGradient> gradients,
                      const at::TensorOptions& gradient_options = at::kDouble);

/// What     The update of loss-free balancing: bias_e += rate * sign(mean(counts) - counts_e), sign(0) = 0.
/// Dtype    counts int64, exact over the whole optimizer step and all ranks; bias fp32 or fp64, on any
///          device.
/// Ref      [Wang2024, Alg 1] arXiv 2408.15664
void update_expert_bias(at::Tensor& expert_bias_E, const at::Tensor& choice_counts_E, double rate);

}  // namespace collegium::moe
