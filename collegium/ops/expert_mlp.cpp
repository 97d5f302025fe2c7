// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/expert_mlp.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "collegium/base/error.h"
#include "collegium/ops/gated_product.h"
#include "collegium/ops/product.h"
#include "collegium/ops/swiglu.h"
#include "collegium/ops/worker_weights.h"

namespace collegium::ops {

namespace {

void keep(const RowSource& x, const at::Tensor& weights_R, const at::Tensor& counts_E,
          const ExpertWeights& experts, ExpertsKept& kept) {
  const std::int64_t total = counts_E.sum().item<std::int64_t>();
  COLLEGIUM_CHECK(x.rows() == total, "{} rows, counts sum to {}", x.rows(), total);
  kept = {.x = x,
          .weights_R = weights_R,
          .counts_E = counts_E,
          .gate_up_RG = at::empty({total, experts.gate_up_EGD.size(1)}, x.values_XD.options())};
}

}  // namespace

at::Tensor expert_mlp(const RowSource& x, const at::Tensor& weights_R, const at::Tensor& counts_E,
                      const ExpertWeights& experts, ExpertsKept& kept, at::Tensor y_RD) {
  if (!x.values_XD.is_cpu()) return expert_mlp_aten(x, weights_R, counts_E, experts, kept, std::move(y_RD));
  keep(x, weights_R, counts_E, experts, kept);
  const auto products = product_dtype(x.values_XD);
  const at::Tensor weights = inner_weights(weights_R, x.values_XD.scalar_type());
  if (!y_RD.defined()) y_RD = at::empty({x.rows(), x.width()}, x.values_XD.options());
  const std::int64_t most_rows = gemm_rows(x.rows(), products);
  // What lies between the two GEMMs, per worker.
  const at::Tensor activations =
      at::empty({at::get_num_threads(), 2 * most_rows, experts.down_EDF.size(2)}, x.values_XD.options());
  const WorkerRows inputs(x, 2 * most_rows, /*padded=*/false);
  WorkerWeights gate_up_weights(experts.gate_up_EGD);
  WorkerWeights down_weights(experts.down_EDF);
  const auto pieces = cut_rows(counts_E, products);
  run_tasks(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i, std::int64_t worker) {
    for (const ExpertRows& rows : gemms_of(pieces[static_cast<std::size_t>(i)], most_rows, products)) {
      const at::Tensor activation = activations.select(0, worker).narrow(0, 0, rows.rows);
      gated_product_into(inputs.rows(rows, rows.rows, worker), gate_up_weights.of(rows.expert, worker),
                         rows.of(weights), rows.of(kept.gate_up_RG), activation);
      product_into(activation, down_weights.of(rows.expert, worker).t(), rows.of(y_RD), Reuse::kLater);
    }
  });
  return y_RD;
}

at::Tensor expert_mlp_aten(const RowSource& x, const at::Tensor& weights_R, const at::Tensor& counts_E,
                           const ExpertWeights& experts, ExpertsKept& kept, at::Tensor y_RD) {
  keep(x, weights_R, counts_E, experts, kept);
  const at::Tensor x_RD = x.tensor();
  if (!y_RD.defined()) y_RD = at::empty_like(x_RD);
  for (const ExpertRows& rows : rows_of_experts(counts_E))
    product_into(rows.of(x_RD), experts.gate_up_EGD.select(0, rows.expert).t(), rows.of(kept.gate_up_RG));
  const at::Tensor activation_RF = swiglu_aten(kept.gate_up_RG, weights_R);
  for (const ExpertRows& rows : rows_of_experts(counts_E))
    product_into(rows.of(activation_RF), experts.down_EDF.select(0, rows.expert).t(), rows.of(y_RD));
  return y_RD;
}

}  // namespace collegium::ops
