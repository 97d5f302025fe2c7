// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/monitors.h"

#include <ATen/core/Tensor.h>

#include <cmath>

namespace collegium::moe {

namespace {

std::vector<double> over_mean(const at::Tensor& values_E) {
  const at::Tensor values = values_E.to(at::kDouble).cpu().contiguous();
  const double mean = values.mean().item<double>();
  std::vector<double> result(values.const_data_ptr<double>(),
                             values.const_data_ptr<double>() + values.numel());
  for (double& value : result) value = mean > 0.0 ? value / mean : 0.0;
  return result;
}

}  // namespace

void MonitorSums::add(const RouterTotals& totals, double max_abs_logit) {
  totals_ += totals;
  raise_max_abs_logit(max_abs_logit);
}

LayerMonitors MonitorSums::monitors(const MoeOptions& options) const {
  LayerMonitors monitors;
  const double num_tokens = totals_.num_tokens();
  if (num_tokens == 0.0) return monitors;
  const auto num_experts = static_cast<double>(options.num_experts);
  const double wanted = totals_.choice_counts_E().sum().item<double>();
  monitors.load = over_mean(totals_.choice_counts_E());
  monitors.importance = over_mean(totals_.importance_E());
  double square = 0.0;
  for (const double load : monitors.load) {
    square += (load - 1.0) * (load - 1.0);
    monitors.max_violation = std::max(monitors.max_violation, load - 1.0);
    if (load == 0.0) ++monitors.dead_experts;
  }
  monitors.load_cv = std::sqrt(square / num_experts);
  monitors.normalized_balance = totals_.normalized_balance();
  if (wanted > 0.0) monitors.drop_rate = totals_.num_dropped() / wanted;
  monitors.router_entropy =
      options.num_experts > 1 ? totals_.entropy() / num_tokens / std::log(num_experts) : 0.0;
  monitors.max_abs_logit = max_abs_logit_;
  return monitors;
}

}  // namespace collegium::moe
