// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/monitors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

namespace collegium::moe {

namespace {

void accumulate(at::Tensor& sum, const at::Tensor& values) { sum = sum.defined() ? sum + values : values; }

std::vector<double> over_mean(const at::Tensor& values_E) {
  const at::Tensor values = values_E.to(at::kDouble).cpu().contiguous();
  const double mean = values.mean().item<double>();
  std::vector<double> result(values.const_data_ptr<double>(),
                             values.const_data_ptr<double>() + values.numel());
  for (double& value : result) value = mean > 0.0 ? value / mean : 0.0;
  return result;
}

}  // namespace

void MonitorSums::add(const RouterStatistics& statistics) {
  num_tokens_ += statistics.num_tokens_B.sum().item<std::int64_t>();
  accumulate(choice_counts_E_, statistics.choice_counts_BE.sum(0));
  accumulate(prob_sums_E_, statistics.prob_sums_BE.sum(0).to(at::kDouble));
  accumulate(importance_E_, statistics.importance_BE.sum(0).to(at::kDouble));
  entropy_ += statistics.entropy_B.sum().item<double>();
  num_dropped_ += statistics.num_dropped;
  max_abs_logit_ = std::max(max_abs_logit_, statistics.max_abs_logit);
}

LayerMonitors MonitorSums::monitors(const MoeOptions& options) const {
  LayerMonitors monitors;
  if (num_tokens_ == 0) return monitors;
  const auto num_experts = static_cast<double>(options.num_experts);
  const auto num_tokens = static_cast<double>(num_tokens_);
  const auto wanted = static_cast<double>(choice_counts_E_.sum().item<std::int64_t>());
  monitors.load = over_mean(choice_counts_E_);
  monitors.importance = over_mean(importance_E_);
  double square = 0.0;
  for (const double load : monitors.load) {
    square += (load - 1.0) * (load - 1.0);
    monitors.max_violation = std::max(monitors.max_violation, load - 1.0);
    if (load == 0.0) ++monitors.dead_experts;
  }
  monitors.load_cv = std::sqrt(square / num_experts);
  if (wanted > 0.0) {
    const at::Tensor product_E = choice_counts_E_.to(at::kDouble) * prob_sums_E_;
    monitors.normalized_balance = num_experts * product_E.sum().item<double>() / (wanted * num_tokens);
    monitors.drop_rate = static_cast<double>(num_dropped_) / wanted;
  }
  monitors.router_entropy = options.num_experts > 1 ? entropy_ / num_tokens / std::log(num_experts) : 0.0;
  monitors.max_abs_logit = max_abs_logit_;
  return monitors;
}

}  // namespace collegium::moe
