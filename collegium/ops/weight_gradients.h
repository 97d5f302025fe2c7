// SPDX-License-Identifier: Apache-2.0
#pragma once

// Gradients of experts' weights: for each expert one product that sums over its rows.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/row_source.h"

namespace collegium::ops {

/// What     Rows that such a product runs over: in bf16 rounded_rows(), as whole products are generated for
///          exact sizes and blocks take even numbers only; the missing ones are zeros, which add nothing.
///          `dtype` is product_dtype().
std::int64_t padded_rows(std::int64_t rows, at::ScalarType dtype);

/// The rows of some experts, each expert's followed by zero rows up to padded_rows(): Z of them. Other
/// devices than the CPU take rows as they are.
class PaddedRows {
 public:
  PaddedRows() = default;
  /// What     For products of tensors like this one. `experts` ascend.
  PaddedRows(const std::vector<ExpertRows>& experts, const at::Tensor& like);

  /// Z.
  std::int64_t total() const { return padded_.empty() ? 0 : padded_.back().end(); }
  /// Where the experts' rows and their padding are, for outer_into().
  const std::vector<ExpertRows>& experts() const { return padded_; }
  /// What     Where rows of one of these experts are.
  ExpertRows of(const ExpertRows& rows) const;
  /// What     Writes zeros between the rows of values_ZX.
  void clear_padding(const at::Tensor& values_ZX) const;
  /// What     The source's rows so ordered; no copy where they already are so and have no index, or where
  ///          products read them by one.
  /// Shape    source [R, D] -> [Z, D]. Dtype any.
  RowSource ordered(const RowSource& source) const;

 private:
  std::vector<ExpertRows> rows_;
  std::vector<ExpertRows> padded_;
};

/// One product per expert: dW_e = sum over e's rows of dy[z] x[z]^T.
/// Shape    grad_ZO [Z, O], x_ZI [Z, I], grad_EOI [E, O, I].
/// Dtype    all in the compute dtype; sums in fp32 (float64 for float64), rounded once.
struct OuterProducts {
  RowSource grad_ZO;
  RowSource x_ZI;
  at::Tensor grad_EOI;  ///< written; exactly zero for an expert without rows
};

/// What     The products of the experts, as tasks of one queue. `experts` says where each one's rows are:
///          any ranges are right, PaddedRows::experts() spare bf16 the making of kernels.
void outer_into(const std::vector<ExpertRows>& experts, const std::vector<OuterProducts>& products);
/// The same with ATen operators only, for any device.
void outer_into_aten(const std::vector<ExpertRows>& experts, const std::vector<OuterProducts>& products);

}  // namespace collegium::ops
