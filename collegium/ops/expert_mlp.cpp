// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/expert_mlp.h"

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/swiglu.h"

namespace collegium::ops {

namespace {

void check_rows(const at::Tensor& rows, const at::Tensor& counts_E) {
  const std::int64_t total = counts_E.sum().item<std::int64_t>();
  COLLEGIUM_CHECK(rows.dim() == 2 && rows.size(0) == total, "{} rows, counts sum to {}", rows.size(0), total);
}

at::Tensor rows_of(const at::Tensor& all, const ExpertRows& which) {
  return all.defined() ? all.narrow(0, which.begin, which.rows) : all;
}

void product(const at::Tensor& a, const at::Tensor& b, at::Tensor out) { at::mm_out(out, a, b); }

// One buffer per worker for what lies between two GEMMs.
at::Tensor scratch(std::int64_t rows, std::int64_t width, const at::Tensor& like) {
  return at::empty({at::get_num_threads(), rows, width}, like.options());
}

at::Tensor inner_weights(const at::Tensor& weights_R, const at::Tensor& rows) {
  return weights_R.defined() ? weights_R.to(at::toOpMathType(rows.scalar_type())).contiguous() : weights_R;
}

}  // namespace

at::Tensor expert_mlp(const at::Tensor& x_RD, const at::Tensor& weights_R, const at::Tensor& counts_E,
                      const ExpertWeights& experts, at::Tensor& gate_up_RG) {
  check_rows(x_RD, counts_E);
  if (!x_RD.is_cpu()) return expert_mlp_aten(x_RD, weights_R, counts_E, experts, gate_up_RG);
  const std::int64_t width = experts.down_EDF.size(2);
  const at::Tensor weights = inner_weights(weights_R, x_RD);
  gate_up_RG = at::empty({x_RD.size(0), 2 * width}, x_RD.options());
  at::Tensor y_RD = at::empty_like(x_RD, x_RD.options(), at::MemoryFormat::Contiguous);
  const std::int64_t most_rows = gemm_rows(x_RD.size(0));
  const at::Tensor activations = scratch(2 * most_rows, width, x_RD);
  const auto pieces = cut_rows(counts_E);
  run_tasks(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i, std::int64_t worker) {
    for (const ExpertRows& rows :
         gemms_of(pieces[static_cast<std::size_t>(i)], most_rows, x_RD.scalar_type())) {
      const at::Tensor gate_up = rows_of(gate_up_RG, rows);
      const at::Tensor activation = activations.select(0, worker).narrow(0, 0, rows.rows);
      product(rows_of(x_RD, rows), experts.gate_up_EGD.select(0, rows.expert).t(), gate_up);
      swiglu_into(gate_up, rows_of(weights, rows), activation);
      product(activation, experts.down_EDF.select(0, rows.expert).t(), rows_of(y_RD, rows));
    }
  });
  return y_RD;
}

ExpertRowGradients expert_mlp_grad_rows(const at::Tensor& grad_RD, const at::Tensor& gate_up_RG,
                                        const at::Tensor& weights_R, const at::Tensor& counts_E,
                                        const ExpertWeights& experts, ExpertRowNeeds needs) {
  check_rows(grad_RD, counts_E);
  if (!grad_RD.is_cpu())
    return expert_mlp_grad_rows_aten(grad_RD, gate_up_RG, weights_R, counts_E, experts, needs);
  const std::int64_t width = experts.down_EDF.size(2);
  const at::Tensor weights = inner_weights(weights_R, gate_up_RG);
  ExpertRowGradients result;
  result.gate_up_RG = at::empty_like(gate_up_RG);
  if (weights.defined()) result.weights_R = at::empty_like(weights);
  if (needs.activation) result.activation_RF = at::empty({grad_RD.size(0), width}, grad_RD.options());
  if (needs.x) result.x_RD = at::empty_like(grad_RD);
  const std::int64_t most_rows = gemm_rows(grad_RD.size(0));
  const at::Tensor inner_gradients = scratch(2 * most_rows, width, grad_RD);
  const auto pieces = cut_rows(counts_E);
  run_tasks(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i, std::int64_t worker) {
    for (const ExpertRows& rows :
         gemms_of(pieces[static_cast<std::size_t>(i)], most_rows, grad_RD.scalar_type())) {
      const at::Tensor inner = inner_gradients.select(0, worker).narrow(0, 0, rows.rows);
      const SwigluGradients out{.gate_up_RG = rows_of(result.gate_up_RG, rows),
                                .weights_R = rows_of(result.weights_R, rows)};
      product(rows_of(grad_RD, rows), experts.down_EDF.select(0, rows.expert), inner);
      swiglu_backward_into(inner, rows_of(gate_up_RG, rows), rows_of(weights, rows), out,
                           rows_of(result.activation_RF, rows));
      if (needs.x)
        product(out.gate_up_RG, experts.gate_up_EGD.select(0, rows.expert), rows_of(result.x_RD, rows));
    }
  });
  if (weights.defined()) result.weights_R = result.weights_R.to(weights_R.scalar_type());
  return result;
}

namespace {

// A tile of an expert's weight gradient: some of its rows, all its columns.
struct OuterTile {
  ExpertRows rows;
  std::int64_t first = 0;  // row of the gradient
  std::int64_t count = 0;
};

// Few experts, or one with most rows, still make enough tasks; a small expert is one task.
std::vector<OuterTile> cut_outer(const at::Tensor& counts_E, std::int64_t out, std::int64_t in) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 29;  // multiply-adds, some milliseconds of a core
  std::vector<OuterTile> tiles;
  for (const ExpertRows& rows : rows_of_experts(counts_E)) {
    const std::int64_t parts = std::clamp(rows.rows * in * out / kLargest, std::int64_t{1},
                                          std::max(std::int64_t{1}, out / kMostGemmRows));
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t first = out * part / parts;
      tiles.push_back({.rows = rows, .first = first, .count = out * (part + 1) / parts - first});
    }
  }
  return tiles;
}

// In bf16 a GEMM's kernel is generated for its exact sizes, which costs as much as a small GEMM; rows per
// expert differ in every step. So rows are rounded up, to multiples of 32 up to 1024 rows and of a 32nd of
// them above, and the missing ones are zeros, which add nothing.
// Products of more than some 10 ms are left alone: their kernel costs little beside them, and every worker
// has copies.
std::int64_t padded_rows(const OuterTile& tile, std::int64_t in, at::ScalarType dtype) {
  constexpr std::int64_t kLargest = std::int64_t{1} << 30;  // multiply-adds
  const std::int64_t rows = tile.rows.rows;
  if (dtype != at::kBFloat16 || rows * in * tile.count > kLargest) return rows;
  std::int64_t step = kSizeStep;
  while (rows > kSizeStep * step) step *= 2;
  return (rows + step - 1) / step * step;
}

// A worker's zero-padded copies of an expert's rows.
class PaddedRows {
 public:
  PaddedRows(std::int64_t most_rows, std::int64_t width, const at::Tensor& like)
      : buffers_(at::empty({at::get_num_threads(), most_rows * width}, like.options())) {}

  at::Tensor of(const at::Tensor& rows, std::int64_t padded, std::int64_t worker) const {
    if (rows.size(0) == padded) return rows;
    const at::Tensor copy =
        buffers_.select(0, worker).narrow(0, 0, padded * rows.size(1)).view({padded, rows.size(1)});
    copy.narrow(0, 0, rows.size(0)).copy_(rows);
    copy.narrow(0, rows.size(0), padded - rows.size(0)).zero_();
    return copy;
  }

 private:
  at::Tensor buffers_;
};

}  // namespace

at::Tensor grouped_outer(const at::Tensor& grad_RO, const at::Tensor& x_RI, const at::Tensor& counts_E) {
  check_rows(x_RI, counts_E);
  COLLEGIUM_CHECK(grad_RO.size(0) == x_RI.size(0), "{} gradient rows for {} rows", grad_RO.size(0),
                  x_RI.size(0));
  if (!x_RI.is_cpu()) return grouped_outer_aten(grad_RO, x_RI, counts_E);
  at::Tensor grad_EOI = at::empty({counts_E.numel(), grad_RO.size(1), x_RI.size(1)}, x_RI.options());
  const auto dtype = x_RI.scalar_type();
  const auto tiles = cut_outer(counts_E, grad_RO.size(1), x_RI.size(1));
  std::int64_t most_rows = 0;
  std::int64_t widest = 0;
  for (const OuterTile& tile : tiles) {
    const std::int64_t padded = padded_rows(tile, x_RI.size(1), dtype);
    if (padded != tile.rows.rows) most_rows = std::max(most_rows, padded);
    widest = std::max(widest, tile.count);
  }
  const PaddedRows grads(most_rows, widest, grad_RO);
  const PaddedRows inputs(most_rows, x_RI.size(1), x_RI);
  run_tasks(static_cast<std::int64_t>(tiles.size()), [&](std::int64_t i, std::int64_t worker) {
    const OuterTile& tile = tiles[static_cast<std::size_t>(i)];
    const at::Tensor grad_OI = grad_EOI.select(0, tile.rows.expert).narrow(0, tile.first, tile.count);
    if (tile.rows.rows == 0) {
      grad_OI.zero_();
      return;
    }
    const std::int64_t padded = padded_rows(tile, x_RI.size(1), dtype);
    const at::Tensor grad = rows_of(grad_RO, tile.rows).narrow(1, tile.first, tile.count);
    product(grads.of(grad, padded, worker).t(), inputs.of(rows_of(x_RI, tile.rows), padded, worker), grad_OI);
  });
  return grad_EOI;
}

at::Tensor expert_mlp_aten(const at::Tensor& x_RD, const at::Tensor& weights_R, const at::Tensor& counts_E,
                           const ExpertWeights& experts, at::Tensor& gate_up_RG) {
  gate_up_RG = at::empty({x_RD.size(0), experts.gate_up_EGD.size(1)}, x_RD.options());
  at::Tensor y_RD = at::empty_like(x_RD);
  for (const ExpertRows& rows : rows_of_experts(counts_E))
    product(rows_of(x_RD, rows), experts.gate_up_EGD.select(0, rows.expert).t(), rows_of(gate_up_RG, rows));
  const at::Tensor activation_RF = swiglu_aten(gate_up_RG, weights_R);
  for (const ExpertRows& rows : rows_of_experts(counts_E))
    product(rows_of(activation_RF, rows), experts.down_EDF.select(0, rows.expert).t(), rows_of(y_RD, rows));
  return y_RD;
}

ExpertRowGradients expert_mlp_grad_rows_aten(const at::Tensor& grad_RD, const at::Tensor& gate_up_RG,
                                             const at::Tensor& weights_R, const at::Tensor& counts_E,
                                             const ExpertWeights& experts, ExpertRowNeeds needs) {
  const at::Tensor inner_RF = at::empty({grad_RD.size(0), experts.down_EDF.size(2)}, grad_RD.options());
  for (const ExpertRows& rows : rows_of_experts(counts_E))
    product(rows_of(grad_RD, rows), experts.down_EDF.select(0, rows.expert), rows_of(inner_RF, rows));
  SwigluGradients inner = swiglu_backward_aten(inner_RF, gate_up_RG, weights_R);
  ExpertRowGradients result{
      .x_RD = {}, .weights_R = inner.weights_R, .gate_up_RG = inner.gate_up_RG, .activation_RF = {}};
  if (needs.activation) result.activation_RF = swiglu_aten(gate_up_RG, weights_R);
  if (needs.x) {
    result.x_RD = at::empty_like(grad_RD);
    for (const ExpertRows& rows : rows_of_experts(counts_E))
      product(rows_of(inner.gate_up_RG, rows), experts.gate_up_EGD.select(0, rows.expert),
              rows_of(result.x_RD, rows));
  }
  return result;
}

at::Tensor grouped_outer_aten(const at::Tensor& grad_RO, const at::Tensor& x_RI, const at::Tensor& counts_E) {
  at::Tensor grad_EOI = at::zeros({counts_E.numel(), grad_RO.size(1), x_RI.size(1)}, x_RI.options());
  for (const ExpertRows& rows : rows_of_experts(counts_E)) {
    if (rows.rows > 0)
      product(rows_of(grad_RO, rows).t(), rows_of(x_RI, rows), grad_EOI.select(0, rows.expert));
  }
  return grad_EOI;
}

}  // namespace collegium::ops
