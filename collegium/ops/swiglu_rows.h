// SPDX-License-Identifier: Apache-2.0
#pragma once

// SwiGLU over some rows and columns on the calling thread: swiglu.h is made of it, and products that have
// such a part of their result in the cache.

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "collegium/ops/row_math.h"

namespace collegium::ops {

/// Columns whose share of a weight's gradient is summed at a time, in a fixed order. A part of the columns
/// begins at a multiple of it.
inline constexpr std::int64_t kSwigluColumns = 128;

/// Rows whose columns are contiguous and that lie `stride` values apart.
template <typename T>
struct StridedRows {
  T* values = nullptr;
  std::int64_t stride = 0;

  T* row(std::int64_t index) const { return values == nullptr ? nullptr : values + index * stride; }
};

/// What     activation = w silu(gate) up; weights null = 1.
template <typename T>
struct SwigluPart {
  std::int64_t rows;
  std::int64_t columns;
  StridedRows<const T> gate;
  StridedRows<const T> up;
  const row_math::Wide<T>* weights;
  StridedRows<T> activation;
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
};
/// What     Writes the gradients of the part.
void swiglu_backward_part(const SwigluBackwardPart<double>& part);
void swiglu_backward_part(const SwigluBackwardPart<float>& part);
void swiglu_backward_part(const SwigluBackwardPart<c10::BFloat16>& part);

}  // namespace collegium::ops
