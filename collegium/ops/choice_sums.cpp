// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/choice_sums.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "collegium/base/error.h"

namespace collegium::ops {

ChoiceSums sum_choices(const at::Tensor& ids_TK, const at::Tensor& weights_TK, std::int64_t num_sequences,
                       std::int64_t num_experts) {
  COLLEGIUM_CHECK(ids_TK.scalar_type() == at::kInt && ids_TK.sizes() == weights_TK.sizes(),
                  "ids must be int32 [T, K], weights [T, K]");
  if (!ids_TK.is_cpu()) return sum_choices_aten(ids_TK, weights_TK, num_sequences, num_experts);
  const at::Tensor ids = ids_TK.contiguous();
  const at::Tensor weights = weights_TK.contiguous();
  const std::int64_t top_k = ids.size(1);
  const std::int64_t slots = num_sequences == 0 ? 0 : ids.numel() / num_sequences;
  const auto zeros = [&](at::ScalarType dtype) { return at::zeros({num_sequences, num_experts}, dtype); };
  ChoiceSums sums{.counts_BE = zeros(at::kLong),
                  .first_counts_BE = zeros(at::kLong),
                  .weights_BE = zeros(weights.scalar_type())};
  AT_DISPATCH_FLOATING_TYPES(weights.scalar_type(), "sum_choices", [&] {
    const auto* id = ids.const_data_ptr<std::int32_t>();
    const auto* weight = weights.const_data_ptr<scalar_t>();
    auto* counts = sums.counts_BE.mutable_data_ptr<std::int64_t>();
    auto* first_counts = sums.first_counts_BE.mutable_data_ptr<std::int64_t>();
    auto* out = sums.weights_BE.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, num_sequences, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t sequence = begin; sequence < end; ++sequence) {
        std::vector<double> sum_E(static_cast<std::size_t>(num_experts), 0.0);
        const std::int64_t row = sequence * num_experts;
        for (std::int64_t slot = sequence * slots; slot < (sequence + 1) * slots; ++slot) {
          const std::int64_t expert = id[slot];
          if (expert < 0) continue;
          COLLEGIUM_CHECK(expert < num_experts, "expert id {} of {} experts", expert, num_experts);
          ++counts[row + expert];
          first_counts[row + expert] += slot % top_k == 0 ? 1 : 0;
          sum_E[static_cast<std::size_t>(expert)] += static_cast<double>(weight[slot]);
        }
        for (std::int64_t expert = 0; expert < num_experts; ++expert)
          out[row + expert] = static_cast<scalar_t>(sum_E[static_cast<std::size_t>(expert)]);
      }
    });
  });
  return sums;
}

ChoiceSums sum_choices_aten(const at::Tensor& ids_TK, const at::Tensor& weights_TK,
                            std::int64_t num_sequences, std::int64_t num_experts) {
  const std::int64_t length = num_sequences == 0 ? 0 : ids_TK.size(0) / num_sequences;
  const at::Tensor chosen_TK = (ids_TK >= 0).to(weights_TK.scalar_type());
  const at::Tensor slot_ids_TK = ids_TK.clamp_min(0).to(at::kLong);
  const at::Tensor zeros_TE = at::zeros({ids_TK.size(0), num_experts}, weights_TK.options());
  const auto sum = [&](const at::Tensor& ids, const at::Tensor& values) {
    return zeros_TE.scatter_add(1, ids, values).reshape({num_sequences, length, num_experts}).sum(1);
  };
  return {.counts_BE = sum(slot_ids_TK, chosen_TK).to(at::kLong),
          .first_counts_BE = sum(slot_ids_TK.narrow(1, 0, 1), chosen_TK.narrow(1, 0, 1)).to(at::kLong),
          .weights_BE = sum(slot_ids_TK, weights_TK * chosen_TK)};
}

}  // namespace collegium::ops
