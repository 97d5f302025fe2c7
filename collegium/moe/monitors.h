// SPDX-License-Identifier: Apache-2.0
#pragma once

// What to watch in every MoE layer, from the statistics of one or more micro-steps.

#include <ATen/core/Tensor.h>

#include <cmath>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/moe/options.h"
#include "collegium/moe/router_totals.h"

namespace collegium::moe {

struct LayerMonitors {
  std::vector<double> load;         ///< choices per expert over the mean: 1 = its share
  std::vector<double> importance;   ///< summed weights per expert over the mean
  double load_cv = 0.0;             ///< coefficient of variation of the load
  double normalized_balance = 0.0;  ///< E sum f P; 1 = balanced
  double max_violation = 0.0;       ///< (max load - mean) / mean: MaxVio of [Wang2024]
  double router_entropy = 0.0;    ///< mean entropy of the probabilities over log E; 0 = certain, 1 = uniform
  double drop_rate = 0.0;         ///< slots dropped over capacity, over chosen slots
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
  fields("drop_rate", m.drop_rate, "slots dropped over capacity / chosen slots");
  fields("dead_experts", m.dead_experts, "experts without a choice");
  fields("max_abs_logit", m.max_abs_logit, "largest |logit|");
}

/// What     A layer's totals over micro-steps, from which the monitors follow.
class MonitorSums {
 public:
  explicit MonitorSums(std::int64_t num_experts) : totals_(num_experts) {}

  /// `totals` of all ranks, and the largest |logit|, of this rank or of all.
  void add(const RouterTotals& totals, double max_abs_logit);
  /// A NaN stays.
  void raise_max_abs_logit(double value) {
    if (!std::isnan(max_abs_logit_) && !(value <= max_abs_logit_)) max_abs_logit_ = value;
  }
  double max_abs_logit() const { return max_abs_logit_; }
  const RouterTotals& totals() const { return totals_; }
  LayerMonitors monitors(const MoeOptions& options) const;

 private:
  RouterTotals totals_;
  double max_abs_logit_ = 0.0;
};

}  // namespace collegium::moe
