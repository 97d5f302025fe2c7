// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/gated_product.h"

#include <algorithm>
#include <cstdint>

#include "collegium/base/error.h"
#include "collegium/ops/product.h"
#include "collegium/ops/swiglu_rows.h"
#include "collegium/ops/tile_product.h"

namespace collegium::ops {

namespace {

using Bf16 = c10::BFloat16;

bool in_tiles(const at::Tensor& a, const at::Tensor& b) {
  return bf16_products() == Bf16Products::kTiles && tiles_take(a, b);
}

// The forward pass wrote these long ago: they come from memory while the block is multiplied.
void fetch(const StridedRows<const Bf16>& rows, std::int64_t count, std::int64_t columns) {
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < columns; column += kLineValues)
      __builtin_prefetch(rows.at(row, column), 0, 2);
  }
}

// Half of a block's columns are gates, the other half the values that they multiply.
void forward_in_tiles(const at::Tensor& x_RD, const at::Tensor& gate_up_GD, const SwigluPart<Bf16>& whole,
                      const StridedRows<Bf16>& gate_up) {
  constexpr std::int64_t kHalf = TileBlock::kColumns / 2;
  const std::int64_t width = whole.columns;
  const at::Tensor turned_DG = gate_up_GD.t();
  const auto x = rows_of<Bf16>(x_RD);
  TileBlock block(x_RD.size(1), 2 * std::min(kHalf, width));
  for (std::int64_t f = 0; f < width; f += kHalf) {
    const std::int64_t half = std::min(kHalf, width - f);
    block.set_columns(2 * half);
    block.order(turned_DG, f, half, 0);
    block.order(turned_DG, width + f, half, half);
    for (std::int64_t row = 0; row < whole.rows; row += TileBlock::kRows) {
      const std::int64_t count = std::min(TileBlock::kRows, whole.rows - row);
      const auto gates = block.multiply(x.from(row, 0), count);
      const auto ups = gates.from(0, half);
      block.write(gates, count, half, gate_up.from(row, f), Reuse::kLater);
      block.write(ups, count, half, gate_up.from(row, width + f), Reuse::kLater);
      SwigluPart<Bf16> part = whole.part(row, count, f, half);
      part.gate = gates;
      part.up = ups;
      swiglu_part(part);
    }
  }
}

void backward_in_tiles(const at::Tensor& grad_RD, const at::Tensor& down_DF,
                       const SwigluBackwardPart<Bf16>& whole) {
  static_assert(TileBlock::kColumns % kSwigluColumns == 0);
  const std::int64_t rows = whole.forward.rows;
  const std::int64_t width = whole.forward.columns;
  const auto grad = rows_of<Bf16>(grad_RD);
  TileBlock block(grad_RD.size(1), std::min(TileBlock::kColumns, width));
  for (std::int64_t f = 0; f < width; f += TileBlock::kColumns) {
    const std::int64_t columns = std::min(TileBlock::kColumns, width - f);
    block.set_columns(columns);
    block.order(down_DF, f, columns, 0);
    for (std::int64_t row = 0; row < rows; row += TileBlock::kRows) {
      const std::int64_t count = std::min(TileBlock::kRows, rows - row);
      SwigluBackwardPart<Bf16> part = whole.part(row, count, f, columns);
      fetch(part.forward.gate, count, columns);
      fetch(part.forward.up, count, columns);
      part.grad = block.multiply(grad.from(row, 0), count);
      swiglu_backward_part(part);
    }
  }
}

void check_sizes(const at::Tensor& matrix, std::int64_t rows, std::int64_t columns, const char* name) {
  COLLEGIUM_CHECK(matrix.size(0) == rows && matrix.size(1) == columns, "{} is [{}, {}], wanted [{}, {}]",
                  name, matrix.size(0), matrix.size(1), rows, columns);
}

}  // namespace

void gated_product_into(const at::Tensor& x_RD, const at::Tensor& gate_up_GD, const at::Tensor& weights_R,
                        const at::Tensor& gate_up_RG, const at::Tensor& activation_RF) {
  check_sizes(gate_up_GD, gate_up_RG.size(1), x_RD.size(1), "gate_up_GD");
  check_sizes(gate_up_RG, x_RD.size(0), 2 * activation_RF.size(1), "gate_up_RG");
  check_sizes(activation_RF, x_RD.size(0), gate_up_RG.size(1) / 2, "activation_RF");
  if (in_tiles(x_RD, gate_up_GD.t())) {
    forward_in_tiles(x_RD, gate_up_GD, whole_swiglu<Bf16>(gate_up_RG, weights_R, activation_RF),
                     mutable_rows_of<Bf16>(gate_up_RG));
    return;
  }
  product_into(x_RD, gate_up_GD.t(), gate_up_RG);
  swiglu_into(gate_up_RG, weights_R, activation_RF);
}

void gated_product_backward_into(const at::Tensor& grad_RD, const at::Tensor& down_DF,
                                 const at::Tensor& gate_up_RG, const at::Tensor& weights_R,
                                 const SwigluGradients& out, const at::Tensor& activation_RF,
                                 const at::Tensor& inner_RF) {
  check_sizes(down_DF, grad_RD.size(1), inner_RF.size(1), "down_DF");
  check_sizes(gate_up_RG, grad_RD.size(0), 2 * inner_RF.size(1), "gate_up_RG");
  check_sizes(out.gate_up_RG, grad_RD.size(0), 2 * inner_RF.size(1), "the gradient of gate_up_RG");
  if (in_tiles(grad_RD, down_DF)) {
    backward_in_tiles(grad_RD, down_DF,
                      whole_swiglu_backward<Bf16>({}, gate_up_RG, weights_R, out, activation_RF));
    return;
  }
  product_into(grad_RD, down_DF, inner_RF);
  swiglu_backward_into(inner_RF, gate_up_RG, weights_R, out, activation_RF);
}

}  // namespace collegium::ops
