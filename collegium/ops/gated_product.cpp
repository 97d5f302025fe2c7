// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/gated_product.h"

#include <algorithm>
#include <cstdint>

#include "collegium/ops/product.h"
#include "collegium/ops/swiglu_rows.h"
#include "collegium/ops/tile_product.h"

namespace collegium::ops {

namespace {

using Bf16 = c10::BFloat16;

bool in_tiles(const at::Tensor& a, const at::Tensor& b) {
  return bf16_products() == Bf16Products::kTiles && tiles_take(a, b);
}

template <typename T>
T* from(T* values, std::int64_t row) {
  return values != nullptr ? values + row : nullptr;
}

const float* weights_of(const at::Tensor& weights_R) {
  return weights_R.defined() ? weights_R.const_data_ptr<float>() : nullptr;
}

// The forward pass wrote these long ago: they come from memory while the block is multiplied.
void fetch(const StridedRows<const Bf16>& rows, std::int64_t count, std::int64_t columns) {
  constexpr std::int64_t kLine = 32;  // values
  for (std::int64_t row = 0; row < count; ++row) {
    for (std::int64_t column = 0; column < columns; column += kLine)
      __builtin_prefetch(rows.row(row) + column, 0, 2);
  }
}

// Half of a block's columns are gates, the other half the values that they multiply.
void forward_in_tiles(const at::Tensor& x_RD, const at::Tensor& gate_up_GD, const float* weights,
                      const Bf16Rows& gate_up, const Bf16Rows& activation) {
  constexpr std::int64_t kHalf = TileBlock::kColumns / 2;
  const std::int64_t rows = x_RD.size(0);
  const std::int64_t width = gate_up_GD.size(0) / 2;
  const at::Tensor turned_DG = gate_up_GD.t();
  const Bf16Rows x(x_RD);
  TileBlock block(x_RD.size(1), 2 * std::min(kHalf, width));
  for (std::int64_t f = 0; f < width; f += kHalf) {
    const std::int64_t half = std::min(kHalf, width - f);
    block.set_columns(2 * half);
    block.order(turned_DG, f, half, 0);
    block.order(turned_DG, width + f, half, half);
    for (std::int64_t row = 0; row < rows; row += TileBlock::kRows) {
      const std::int64_t count = std::min(TileBlock::kRows, rows - row);
      const Bf16Rows both = block.multiply({x.at(row, 0), x.stride}, count);
      const Bf16Rows ups(both.at(0, half), both.stride);
      copy_rows(both, count, half, {gate_up.at(row, f), gate_up.stride}, Reuse::kLater);
      copy_rows(ups, count, half, {gate_up.at(row, width + f), gate_up.stride}, Reuse::kLater);
      swiglu_part(SwigluPart<Bf16>{.rows = count,
                                   .columns = half,
                                   .gate = {both.values, both.stride},
                                   .up = {ups.values, ups.stride},
                                   .weights = from(weights, row),
                                   .activation = {activation.at(row, f), activation.stride}});
    }
  }
}

void backward_in_tiles(const at::Tensor& grad_RD, const at::Tensor& down_DF,
                       const SwigluBackwardPart<Bf16>& all) {
  static_assert(TileBlock::kColumns % kSwigluColumns == 0);
  const std::int64_t rows = grad_RD.size(0);
  const std::int64_t width = down_DF.size(1);
  const Bf16Rows grad(grad_RD);
  TileBlock block(grad_RD.size(1), std::min(TileBlock::kColumns, width));
  for (std::int64_t f = 0; f < width; f += TileBlock::kColumns) {
    const std::int64_t columns = std::min(TileBlock::kColumns, width - f);
    block.set_columns(columns);
    block.order(down_DF, f, columns, 0);
    for (std::int64_t row = 0; row < rows; row += TileBlock::kRows) {
      const std::int64_t count = std::min(TileBlock::kRows, rows - row);
      const auto part = [row, f](const auto& all_rows) {
        auto some = all_rows;
        some.values = from(all_rows.row(row), f);
        return some;
      };
      fetch(part(all.forward.gate), count, columns);
      fetch(part(all.forward.up), count, columns);
      const Bf16Rows inner = block.multiply({grad.at(row, 0), grad.stride}, count);
      swiglu_backward_part(SwigluBackwardPart<Bf16>{.forward = {.rows = count,
                                                                .columns = columns,
                                                                .gate = part(all.forward.gate),
                                                                .up = part(all.forward.up),
                                                                .weights = from(all.forward.weights, row),
                                                                .activation = part(all.forward.activation)},
                                                    .grad = {inner.values, inner.stride},
                                                    .grad_gate = part(all.grad_gate),
                                                    .grad_up = part(all.grad_up),
                                                    .grad_weights = from(all.grad_weights, row),
                                                    .adds = f > 0 && all.grad_weights != nullptr});
    }
  }
}

}  // namespace

void gated_product_into(const at::Tensor& x_RD, const at::Tensor& gate_up_GD, const at::Tensor& weights_R,
                        const at::Tensor& gate_up_RG, const at::Tensor& activation_RF) {
  if (in_tiles(x_RD, gate_up_GD.t())) {
    forward_in_tiles(x_RD, gate_up_GD, weights_of(weights_R), Bf16Rows(gate_up_RG), Bf16Rows(activation_RF));
    return;
  }
  product_into(x_RD, gate_up_GD.t(), gate_up_RG);
  swiglu_into(gate_up_RG, weights_R, activation_RF);
}

void gated_product_backward_into(const at::Tensor& grad_RD, const at::Tensor& down_DF,
                                 const at::Tensor& gate_up_RG, const at::Tensor& weights_R,
                                 const SwigluGradients& out, const at::Tensor& activation_RF,
                                 const at::Tensor& inner_RF) {
  if (!in_tiles(grad_RD, down_DF)) {
    product_into(grad_RD, down_DF, inner_RF);
    swiglu_backward_into(inner_RF, gate_up_RG, weights_R, out, activation_RF);
    return;
  }
  const std::int64_t width = down_DF.size(1);
  const Bf16Rows h(gate_up_RG);
  const Bf16Rows grad_h(out.gate_up_RG);
  StridedRows<Bf16> activation;
  if (activation_RF.defined()) activation = {activation_RF.mutable_data_ptr<Bf16>(), width};
  const SwigluPart<Bf16> forward{.rows = grad_RD.size(0),
                                 .columns = width,
                                 .gate = {h.values, h.stride},
                                 .up = {h.at(0, width), h.stride},
                                 .weights = weights_of(weights_R),
                                 .activation = activation};
  backward_in_tiles(
      grad_RD, down_DF,
      {.forward = forward,
       .grad = {},
       .grad_gate = {grad_h.values, grad_h.stride},
       .grad_up = {grad_h.at(0, width), grad_h.stride},
       .grad_weights = out.weights_R.defined() ? out.weights_R.mutable_data_ptr<float>() : nullptr,
       .adds = false});
}

}  // namespace collegium::ops
