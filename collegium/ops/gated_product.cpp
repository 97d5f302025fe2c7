// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/gated_product.h"

#include <cstdint>

#include "collegium/base/error.h"
#include "collegium/ops/block_product.h"
#include "collegium/ops/column_block.h"
#include "collegium/ops/product.h"
#include "collegium/ops/swiglu_rows.h"

namespace collegium::ops {

namespace {

// The forward pass wrote these long ago: they come from memory while the block is multiplied.
template <typename T>
void fetch(const StridedRows<const T>& rows, std::int64_t count, std::int64_t columns) {
  constexpr std::int64_t kLineValues = kLineBytes / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < columns; column += kLineValues)
      __builtin_prefetch(rows.at(row, column), 0, 2);
  }
}

// Gates and the values that they multiply are two parts of a block.
template <typename T>
void forward_in_blocks(const RowSource& x_RD, const at::Tensor& gate_up_DG, const SwigluPart<T>& whole,
                       const StridedRows<T>& gate_up) {
  product_in_blocks<T>(x_RD, gate_up_DG, 2, {},
                       [&](const StridedRows<const T>& results, const BlockRange& range) {
                         SwigluPart<T> part = whole.part(range.row, range.rows, range.column, range.columns);
                         part.gate = results;
                         part.up = results.from(0, range.columns);
                         write_block(part.gate, range.rows, range.columns,
                                     gate_up.from(range.row, range.column), Reuse::kLater);
                         write_block(part.up, range.rows, range.columns,
                                     gate_up.from(range.row, whole.columns + range.column), Reuse::kLater);
                         swiglu_part(part);
                       });
}

template <typename T>
void backward_in_blocks(const RowSource& grad_RD, const at::Tensor& down_DF,
                        const SwigluBackwardPart<T>& whole) {
  static_assert(ColumnBlock<T>::kLeastColumns % kSwigluColumns == 0);
  const auto fetch_inputs = [&](const BlockRange& range) {
    for (const auto& rows : {whole.forward.gate, whole.forward.up})
      fetch(rows.from(range.row, range.column), range.rows, range.columns);
  };
  product_in_blocks<T>(grad_RD, down_DF, 1, fetch_inputs,
                       [&](const StridedRows<const T>& results, const BlockRange& range) {
                         auto part = whole.part(range.row, range.rows, range.column, range.columns);
                         part.grad = results;
                         swiglu_backward_part(part);
                       });
}

void check_sizes(const at::Tensor& matrix, std::int64_t rows, std::int64_t columns, const char* name) {
  COLLEGIUM_CHECK(matrix.size(0) == rows && matrix.size(1) == columns, "{} is [{}, {}], wanted [{}, {}]",
                  name, matrix.size(0), matrix.size(1), rows, columns);
}

}  // namespace

void gated_product_into(const RowSource& x_RD, const at::Tensor& gate_up_GD, const at::Tensor& weights_R,
                        const at::Tensor& gate_up_RG, const at::Tensor& activation_RF) {
  check_sizes(gate_up_GD, gate_up_RG.size(1), x_RD.width(), "gate_up_GD");
  check_sizes(gate_up_RG, x_RD.rows(), 2 * activation_RF.size(1), "gate_up_RG");
  check_sizes(activation_RF, x_RD.rows(), gate_up_RG.size(1) / 2, "activation_RF");
  const auto in_blocks = [&]<typename T>() {
    forward_in_blocks(x_RD, gate_up_GD.t(), whole_swiglu<T>(gate_up_RG, weights_R, activation_RF),
                      mutable_rows_of<T>(gate_up_RG));
  };
  if (multiplies_in_blocks(x_RD, gate_up_GD.t())) {
    return with_type_of(gate_up_RG, in_blocks);
  }
  product_into(x_RD, gate_up_GD.t(), gate_up_RG);
  swiglu_into(gate_up_RG, weights_R, activation_RF);
}

void gated_product_backward_into(const RowSource& grad_RD, const at::Tensor& down_DF,
                                 const at::Tensor& gate_up_RG, const at::Tensor& weights_R,
                                 const SwigluGradients& out, const at::Tensor& activation_RF,
                                 const at::Tensor& inner_RF) {
  check_sizes(down_DF, grad_RD.width(), inner_RF.size(1), "down_DF");
  check_sizes(gate_up_RG, grad_RD.rows(), 2 * inner_RF.size(1), "gate_up_RG");
  check_sizes(out.gate_up_RG, grad_RD.rows(), 2 * inner_RF.size(1), "the gradient of gate_up_RG");
  const auto in_blocks = [&]<typename T>() {
    backward_in_blocks(grad_RD, down_DF,
                       whole_swiglu_backward<T>({}, gate_up_RG, weights_R, out, activation_RF));
  };
  if (multiplies_in_blocks(grad_RD, down_DF)) {
    return with_type_of(gate_up_RG, in_blocks);
  }
  product_into(grad_RD, down_DF, inner_RF);
  swiglu_backward_into(inner_RF, gate_up_RG, weights_R, out, activation_RF);
}

}  // namespace collegium::ops
