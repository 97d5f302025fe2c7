// SPDX-License-Identifier: Apache-2.0
#pragma once

// SwiGLU over some rows and columns on the calling thread: swiglu.h is made of it, and products that have
// such a part of their result in the cache.

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "collegium/ops/row_math.h"
#include "collegium/ops/strided_rows.h"
#include "collegium/ops/swiglu.h"

namespace collegium::ops {

/// Columns whose share of a weight's gradient is summed at a time, in a fixed order. A part of the columns
/// begins at a multiple of it.
inline constexpr std::int64_t kSwigluColumns = 128;

/// What     activation = w silu(gate) up; weights null = 1.
template <typename T>
struct SwigluPart {
  std::int64_t rows;
  std::int64_t columns;
  StridedRows<const T> gate;
  StridedRows<const T> up;
  const row_math::Wide<T>* weights;
  StridedRows<T> activation;

  /// What     Some of its rows and columns.
  SwigluPart part(std::int64_t row, std::int64_t some_rows, std::int64_t column,
                  std::int64_t some_columns) const {
    return {.rows = some_rows,
            .columns = some_columns,
            .gate = gate.from(row, column),
            .up = up.from(row, column),
            .weights = weights != nullptr ? weights + row : nullptr,
            .activation = activation.from(row, column)};
  }
};
/// What     Writes the part's activation.
void swiglu_part(const SwigluPart<double>& part);
void swiglu_part(const SwigluPart<float>& part);
void swiglu_part(const SwigluPart<c10::BFloat16>& part);

/// What     The gradients of it; the part's activation is written again unless null. `grad_weights`, null or
///          one per row, receives the sum over these columns, or where `adds` it is added.
template <typename T>
struct SwigluBackwardPart {
  SwigluPart<T> forward;
  StridedRows<const T> grad;  // dLoss / dactivation
  StridedRows<T> grad_gate;
  StridedRows<T> grad_up;
  row_math::Wide<T>* grad_weights;
  bool adds;

  /// What     Some of its rows and columns. Parts of a row are computed from its first column on: the others
  ///          add to the weight's gradient.
  SwigluBackwardPart part(std::int64_t row, std::int64_t rows, std::int64_t column,
                          std::int64_t columns) const {
    return {.forward = forward.part(row, rows, column, columns),
            .grad = grad.from(row, column),
            .grad_gate = grad_gate.from(row, column),
            .grad_up = grad_up.from(row, column),
            .grad_weights = grad_weights != nullptr ? grad_weights + row : nullptr,
            .adds = column > 0 && grad_weights != nullptr};
  }
};
/// What     Writes the gradients of the part.
void swiglu_backward_part(const SwigluBackwardPart<double>& part);
void swiglu_backward_part(const SwigluBackwardPart<float>& part);
void swiglu_backward_part(const SwigluBackwardPart<c10::BFloat16>& part);

/// What     All of swiglu() for these tensors, see swiglu_into(); `activation_RF` may be undefined.
template <typename T>
SwigluPart<T> whole_swiglu(const at::Tensor& gate_up_RG, const at::Tensor& weights_R,
                           const at::Tensor& activation_RF) {
  const std::int64_t width = gate_up_RG.size(1) / 2;
  const auto gate_up = rows_of<T>(gate_up_RG);
  return {.rows = gate_up_RG.size(0),
          .columns = width,
          .gate = gate_up,
          .up = gate_up.from(0, width),
          .weights = weights_R.defined() ? weights_R.const_data_ptr<row_math::Wide<T>>() : nullptr,
          .activation = mutable_rows_of<T>(activation_RF)};
}

/// What     All of its gradients, see swiglu_backward_into(); `grad_RF` may be undefined and given later.
template <typename T>
SwigluBackwardPart<T> whole_swiglu_backward(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                                            const at::Tensor& weights_R, const SwigluGradients& out,
                                            const at::Tensor& activation_RF) {
  using W = row_math::Wide<T>;
  const auto grad_gate_up = mutable_rows_of<T>(out.gate_up_RG);
  return {.forward = whole_swiglu<T>(gate_up_RG, weights_R, activation_RF),
          .grad = rows_of<T>(grad_RF),
          .grad_gate = grad_gate_up,
          .grad_up = grad_gate_up.from(0, gate_up_RG.size(1) / 2),
          .grad_weights = out.weights_R.defined() ? out.weights_R.mutable_data_ptr<W>() : nullptr,
          .adds = false};
}

}  // namespace collegium::ops
