// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/router_totals.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "collegium/base/error.h"

namespace collegium::moe {

namespace {

at::Tensor sum_rows(const at::Tensor& rows_BE) { return rows_BE.to(at::kDouble).sum(0); }

at::Tensor sequence_product(const RouterStatistics& s, const at::Tensor& counts_BE) {
  const at::Tensor tokens_B1 = s.num_tokens_B.to(at::kDouble).clamp_min(1).unsqueeze(1);
  return (counts_BE.to(at::kDouble) * s.prob_sums_BE.to(at::kDouble) / tokens_B1).sum();
}

}  // namespace

RouterTotals::RouterTotals(std::int64_t num_experts) : values_(at::zeros({size(num_experts)}, at::kDouble)) {}

RouterTotals::RouterTotals(const RouterStatistics& s) : load_is_smooth_(s.load_BE.defined()) {
  const at::NoGradGuard no_grad;
  const at::Tensor scalars = at::stack(
      {s.num_tokens_B.sum().to(at::kDouble),
       at::scalar_tensor(static_cast<double>(s.num_dropped), s.squared_lse_B.options().dtype(at::kDouble)),
       s.squared_lse_B.to(at::kDouble).sum(), s.entropy_B.to(at::kDouble).sum(),
       sequence_product(s, s.choice_counts_BE), sequence_product(s, s.first_counts_BE)});
  // Ranks add them up and losses are computed from them on the CPU, wherever the layer runs.
  values_ =
      at::cat({scalars, sum_rows(s.choice_counts_BE), sum_rows(s.first_counts_BE), sum_rows(s.prob_sums_BE),
               sum_rows(s.importance_BE), sum_rows(load_is_smooth_ ? s.load_BE : s.choice_counts_BE)})
          .cpu();
}

RouterTotals& RouterTotals::operator+=(const RouterTotals& other) {
  COLLEGIUM_CHECK(values_.numel() == other.values_.numel(), "{} experts and {}", num_experts(),
                  other.num_experts());
  values_.add_(other.values_);
  load_is_smooth_ = other.load_is_smooth_;
  return *this;
}

double RouterTotals::normalized_balance() const {
  const double choices = choice_counts_E().sum().item<double>();
  if (choices == 0.0) return 0.0;
  const double product = (choice_counts_E() * prob_sums_E()).sum().item<double>();
  return static_cast<double>(num_experts()) * product / (choices * num_tokens());
}

double RouterTotals::scalar(std::int64_t index) const { return values_.const_data_ptr<double>()[index]; }

at::Tensor RouterTotals::vector(std::int64_t index) const {
  return values_.narrow(0, kScalars + index * num_experts(), num_experts());
}

}  // namespace collegium::moe
