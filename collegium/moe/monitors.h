// SPDX-License-Identifier: Apache-2.0
#pragma once

// What to watch in every MoE layer, from the statistics of one or more micro-steps.

#include <ATen/core/Tensor.h>

#include <vector>

#include "collegium/base/fields.h"
#include "collegium/moe/options.h"
#include "collegium/moe/routing.h"

namespace collegium::moe {

struct LayerMonitors {
  std::vector<double> load;         ///< choices per expert over the mean: 1 = its share
  std::vector<double> importance;   ///< summed weights per expert over the mean
  double load_cv = 0.0;             ///< coefficient of variation of the load
  double normalized_balance = 0.0;  ///< E sum f P; 1 = balanced
  double max_violation = 0.0;       ///< (max load - mean) / mean: MaxVio of [Wang2024]
  double router_entropy = 0.0;    ///< mean entropy of the probabilities over log E; 0 = certain, 1 = uniform
  double drop_rate = 0.0;         ///< dropped over wanted slots
  std::int64_t dead_experts = 0;  ///< experts that nobody chose
  double max_abs_logit = 0.0;
};
template <class Fields>
void describe(Fields& fields, LayerMonitors& m) {
  fields("load", m.load, "choices per expert over the mean");
  fields("importance", m.importance, "summed weights per expert over the mean");
  fields("load_cv", m.load_cv, "coefficient of variation of the load");
  fields("normalized_balance", m.normalized_balance, "E sum f P; 1 = balanced");
  fields("max_violation", m.max_violation, "(max load - mean) / mean");
  fields("router_entropy", m.router_entropy, "mean entropy of the probabilities / log E");
  fields("drop_rate", m.drop_rate, "dropped / wanted slots");
  fields("dead_experts", m.dead_experts, "experts without a choice");
  fields("max_abs_logit", m.max_abs_logit, "largest |logit|");
}

/// What     Sums of a layer's statistics over micro-steps (and, later, ranks), from which the monitors
/// follow.
class MonitorSums {
 public:
  void add(const RouterStatistics& statistics);
  LayerMonitors monitors(const MoeOptions& options) const;
  /// int64 [E], exact: what loss-free balancing uses.
  const at::Tensor& choice_counts_E() const { return choice_counts_E_; }

 private:
  std::int64_t num_tokens_ = 0;
  at::Tensor choice_counts_E_;
  at::Tensor prob_sums_E_;
  at::Tensor importance_E_;
  double entropy_ = 0.0;
  std::int64_t num_dropped_ = 0;
  double max_abs_logit_ = 0.0;
};

}  // namespace collegium::moe
