// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/ops/expert_mlp.h"
#include "collegium/ops/gated_product.h"
#include "collegium/ops/product.h"
#include "collegium/ops/swiglu.h"
#include "collegium/ops/transpose.h"
#include "collegium/ops/worker_weights.h"

namespace collegium::ops {

namespace {

// An expert that is one task with its weights' gradients: few enough rows for the core's caches, and at most
// some milliseconds, so that cores end together.
// The bound is below what outer_into() cuts, so that the weights' gradients are the same products either way.
bool is_small(std::int64_t padded, std::int64_t hidden, std::int64_t width) {
  constexpr std::int64_t kMostRows = 1024;
  constexpr std::int64_t kLargest = std::int64_t{1} << 27;  // multiply-adds of a GEMM
  return padded <= kMostRows && padded * hidden * width <= kLargest;
}

at::Tensor empty_rows(std::int64_t rows, std::int64_t width, const at::TensorOptions& options) {
  return at::empty({at::get_num_threads(), rows, width}, options);
}

}  // namespace

// Buffers of every worker; `gate_up`, `activation` and `x` for small experts only.
struct ExpertMlpBackward::Workspace {
  std::int64_t most_rows;  // of a GEMM
  at::Tensor inner;        // dLoss/d(weighted activation)
  at::Tensor gate_up;
  at::Tensor activation;
  WorkerRows grad;
  WorkerRows x;
  WorkerWeights gate_up_weights;
  WorkerWeights down_weights;
  WorkerTransposes turned;  // for small experts
};

ExpertMlpBackward::ExpertMlpBackward(const ExpertsKept& kept, ExpertWeights experts, RowSource grad,
                                     const ExpertNeeds& needs)
    : kept_(kept), experts_(std::move(experts)), grad_(std::move(grad)), needs_(needs) {
  COLLEGIUM_CHECK(grad_.rows() == kept.x.rows(), "{} gradient rows for {} rows", grad_.rows(), kept.x.rows());
}

ExpertRowGradients ExpertMlpBackward::rows(WeightGradients when, at::Tensor x_RD) {
  const auto options = kept_.gate_up_RG.options();
  if (needs_.rows)
    rows_.x_RD = x_RD.defined() ? std::move(x_RD) : at::empty({grad_.rows(), grad_.width()}, options);
  if (needs_.gate_up) weights_.gate_up_EGD = at::empty(experts_.gate_up_EGD.sizes(), options);
  if (needs_.down) weights_.down_EDF = at::empty(experts_.down_EDF.sizes(), options);
  if (kept_.gate_up_RG.is_cpu()) {
    rows_on_cpu(when);
  } else {
    rows_in_aten();
  }
  if (rows_.weights_R.defined()) rows_.weights_R = rows_.weights_R.to(kept_.weights_R.scalar_type());
  return std::exchange(rows_, {});
}

void ExpertMlpBackward::rows_on_cpu(WeightGradients when) {
  const auto options = kept_.gate_up_RG.options();
  const auto dtype = product_dtype(kept_.gate_up_RG);
  const std::int64_t hidden = grad_.width();
  const std::int64_t width = experts_.down_EDF.size(2);
  row_weights_R_ = inner_weights(kept_.weights_R, kept_.gate_up_RG.scalar_type());
  if (row_weights_R_.defined()) rows_.weights_R = at::empty_like(row_weights_R_);
  const std::int64_t most_rows = gemm_rows(grad_.rows(), dtype);
  std::vector<ExpertRows> small;
  std::vector<ExpertRows> large;
  std::vector<ExpertRows> pieces;
  std::int64_t small_rows = 0;
  for (const ExpertRows& expert : rows_of_experts(kept_.counts_E)) {
    const std::int64_t padded = padded_rows(expert.rows, dtype);
    if (when == WeightGradients::kWithRows && is_small(padded, hidden, width)) {
      small.push_back(expert);
      small_rows = std::max(small_rows, padded);
    } else {
      large.push_back(expert);
      const auto cut = cut_rows(expert, most_rows);
      pieces.insert(pieces.end(), cut.begin(), cut.end());
    }
  }
  after_ = PaddedRows(large, kept_.gate_up_RG);
  grad_gate_up_ZG_ = at::empty({after_.total(), 2 * width}, options);
  after_.clear_padding(grad_gate_up_ZG_);
  if (needs_.down) {
    activation_ZF_ = at::empty({after_.total(), width}, options);
    after_.clear_padding(activation_ZF_);
  }
  const bool padded = !small.empty() && dtype == at::kBFloat16;
  const std::int64_t piece_rows = pieces.empty() ? 0 : 2 * most_rows;
  Workspace space{
      .most_rows = most_rows,
      .inner = empty_rows(std::max(piece_rows, small_rows), width, options),
      .gate_up = empty_rows(small_rows, 2 * width, options),
      .activation = empty_rows(small_rows, width, options),
      .grad = WorkerRows(grad_, std::max(piece_rows, small_rows), padded),
      .x = WorkerRows(kept_.x, small_rows, padded),
      .gate_up_weights = WorkerWeights(experts_.gate_up_EGD),
      .down_weights = WorkerWeights(experts_.down_EDF),
      .turned = WorkerTransposes(options.dtype(dtype),
                                 WorkerTransposes::values(small_rows, std::max(hidden, 2 * width)))};
  const auto num_small = static_cast<std::int64_t>(small.size());
  const auto num_pieces = static_cast<std::int64_t>(pieces.size());
  run_tasks(num_small + num_pieces, [&](std::int64_t i, std::int64_t worker) {
    if (i < num_small) {
      small_expert(small[static_cast<std::size_t>(i)], space, worker);
    } else {
      piece_of_large(pieces[static_cast<std::size_t>(i - num_small)], space, worker);
    }
  });
}

void ExpertMlpBackward::piece_of_large(const ExpertRows& piece, Workspace& space, std::int64_t worker) const {
  for (const ExpertRows& rows : gemms_of(piece, space.most_rows, product_dtype(kept_.gate_up_RG))) {
    const at::Tensor inner = space.inner.select(0, worker).narrow(0, 0, rows.rows);
    const ExpertRows padded = after_.of(rows);
    const SwigluGradients out{.gate_up_RG = padded.of(grad_gate_up_ZG_),
                              .weights_R = rows.of(rows_.weights_R)};
    gated_product_backward_into(space.grad.rows(rows, rows.rows, worker),
                                space.down_weights.of(rows.expert, worker), rows.of(kept_.gate_up_RG),
                                rows.of(row_weights_R_), out, padded.of(activation_ZF_), inner);
    if (needs_.rows)
      product_into(out.gate_up_RG, space.gate_up_weights.of(rows.expert, worker), rows.of(rows_.x_RD),
                   Reuse::kLater);
  }
}

// The GEMMs are those of a large expert, so results do not depend on when the weights' gradients are
// computed.
void ExpertMlpBackward::small_expert(const ExpertRows& expert, Workspace& space, std::int64_t worker) const {
  const auto dtype = product_dtype(kept_.gate_up_RG);
  const auto gradient_of = [&expert](const at::Tensor& all) {
    return all.defined() ? all.select(0, expert.expert) : all;
  };
  const at::Tensor grad_down = gradient_of(weights_.down_EDF);
  const at::Tensor grad_gate_up = gradient_of(weights_.gate_up_EGD);
  if (expert.rows == 0) {
    if (needs_.down) grad_down.zero_();
    if (needs_.gate_up) grad_gate_up.zero_();
    return;
  }
  const std::int64_t padded = padded_rows(expert.rows, dtype);
  const RowSource grad = space.grad.rows(expert, padded, worker);
  const at::Tensor gate_up = space.gate_up.select(0, worker).narrow(0, 0, padded);
  const at::Tensor activation = space.activation.select(0, worker).narrow(0, 0, padded);
  std::vector<ExpertRows> gemms;
  for (const ExpertRows& piece : cut_rows(expert, space.most_rows)) {
    const auto cut = gemms_of(piece, space.most_rows, dtype);
    gemms.insert(gemms.end(), cut.begin(), cut.end());
  }
  const auto within = [&expert](const at::Tensor& all, const ExpertRows& rows) {
    return all.narrow(0, rows.begin - expert.begin, rows.rows);
  };
  for (const ExpertRows& rows : gemms) {
    const at::Tensor inner = space.inner.select(0, worker).narrow(0, 0, rows.rows);
    gated_product_backward_into(grad.some_rows(rows.begin - expert.begin, rows.rows),
                                space.down_weights.of(rows.expert, worker), rows.of(kept_.gate_up_RG),
                                rows.of(row_weights_R_),
                                {.gate_up_RG = within(gate_up, rows), .weights_R = rows.of(rows_.weights_R)},
                                within(activation, rows), inner);
  }
  const std::int64_t missing = padded - expert.rows;
  activation.narrow(0, expert.rows, missing).zero_();
  gate_up.narrow(0, expert.rows, missing).zero_();
  if (needs_.down) product_into(space.turned.of(grad, worker), activation, grad_down, Reuse::kLater);
  for (const ExpertRows& rows : gemms) {
    if (needs_.rows)
      product_into(within(gate_up, rows), space.gate_up_weights.of(rows.expert, worker), rows.of(rows_.x_RD),
                   Reuse::kLater);
  }
  if (needs_.gate_up)
    product_into(space.turned.of(gate_up, worker), space.x.rows(expert, padded, worker), grad_gate_up,
                 Reuse::kLater);
}

ExpertWeightGradients ExpertMlpBackward::weights() {
  std::vector<OuterProducts> products;
  if (needs_.down) products.push_back({after_.ordered(grad_), activation_ZF_, weights_.down_EDF});
  grad_ = {};  // received rows that were copied go before the others are
  if (needs_.gate_up) products.push_back({grad_gate_up_ZG_, after_.ordered(kept_.x), weights_.gate_up_EGD});
  const auto outer = kept_.gate_up_RG.is_cpu() ? outer_into : outer_into_aten;
  outer(after_.experts(), products);
  return std::move(weights_);
}

void ExpertMlpBackward::rows_in_aten() {
  const at::Tensor grad_RD = grad_.tensor();
  const auto experts = rows_of_experts(kept_.counts_E);
  after_ = PaddedRows(experts, grad_RD);
  const at::Tensor inner_RF =
      at::empty({grad_RD.size(0), experts_.down_EDF.size(2)}, kept_.gate_up_RG.options());
  for (const ExpertRows& rows : experts)
    product_into(rows.of(grad_RD), experts_.down_EDF.select(0, rows.expert), rows.of(inner_RF));
  const SwigluGradients inner = swiglu_backward_aten(inner_RF, kept_.gate_up_RG, kept_.weights_R);
  rows_.weights_R = inner.weights_R;
  grad_gate_up_ZG_ = inner.gate_up_RG;
  if (needs_.down) activation_ZF_ = swiglu_aten(kept_.gate_up_RG, kept_.weights_R);
  if (!needs_.rows) return;
  for (const ExpertRows& rows : experts)
    product_into(rows.of(inner.gate_up_RG), experts_.gate_up_EGD.select(0, rows.expert), rows.of(rows_.x_RD));
}

}  // namespace collegium::ops
