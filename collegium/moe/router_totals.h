// SPDX-License-Identifier: Apache-2.0
#pragma once

// What batch-scoped losses and monitors are computed from: sums over tokens that ranks and micro-steps add
// up.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "collegium/moe/routing.h"

namespace collegium::moe {

/// One layer's sums, in one flat float64 tensor so that ranks reduce all of them at once; on the CPU,
/// wherever the layer runs. Counts are exact: float64 holds integers up to 2^53.
class RouterTotals {
 public:
  /// Zero.
  explicit RouterTotals(std::int64_t num_experts);
  /// The sums over the rows of one rank's statistics.
  explicit RouterTotals(const RouterStatistics& statistics);

  RouterTotals& operator+=(const RouterTotals& other);

  /// [size(num_experts)]: what ranks add up, in place.
  at::Tensor& values() { return values_; }
  static std::int64_t size(std::int64_t num_experts) { return kScalars + kVectors * num_experts; }

  std::int64_t num_experts() const { return (values_.numel() - kScalars) / kVectors; }
  double num_tokens() const { return scalar(0); }
  double num_dropped() const { return scalar(1); }  ///< slots
  double squared_lse() const { return scalar(2); }
  double entropy() const { return scalar(3); }
  /// sum over sequences b of sum_e counts_be probs_be / tokens_b: what losses of scope `sequence` need.
  double sequence_choice_product() const { return scalar(4); }
  double sequence_first_product() const { return scalar(5); }
  at::Tensor choice_counts_E() const { return vector(0); }  ///< before any drop, all K
  at::Tensor first_counts_E() const { return vector(1); }
  at::Tensor prob_sums_E() const { return vector(2); }
  at::Tensor importance_E() const { return vector(3); }
  at::Tensor load_E() const { return vector(4); }  ///< smooth load of noisy top-K, else the counts
  /// E sum_e f_e P_e with f the shares of all choices, whatever their number: 1 = balanced; 0 without a
  /// choice.
  double normalized_balance() const;
  bool load_is_smooth() const { return load_is_smooth_; }

 private:
  static constexpr std::int64_t kScalars = 6;
  static constexpr std::int64_t kVectors = 5;

  double scalar(std::int64_t index) const;
  at::Tensor vector(std::int64_t index) const;

  at::Tensor values_;
  bool load_is_smooth_ = false;
};

}  // namespace collegium::moe
