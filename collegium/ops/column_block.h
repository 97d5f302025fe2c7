// SPDX-License-Identifier: Apache-2.0
#pragma once

// Some columns of a product's second factor in the order of oneDNN's block kernel, which ATen exports. A
// whole product of ATen's brings both factors into another order and its sums through memory; here some
// columns are put in order once for all rows, and sums of a few rows are at hand in the core's first cache.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "collegium/ops/strided_rows.h"
#include "collegium/ops/thread_buffer.h"

namespace collegium::ops {

/// What     Whether ATen multiplies blocks of T (float or BFloat16) in the order that ColumnBlock writes;
///          found once, by a small product. Its oneDNN must stay enabled.
template <typename T>
bool has_block_kernel();

/// Columns of b [I, O] in order, and room for the sums of kRows rows. T is float or BFloat16; sums are fp32.
/// Belongs to one thread.
template <typename T>
class ColumnBlock {
 public:
  static constexpr std::int64_t kRows = 32;
  /// Columns are a multiple of kLeastColumns, or all of a smaller factor.
  static constexpr std::int64_t kLeastColumns = 128;
  static constexpr std::int64_t kMostColumns = 256;

  /// What     Columns at a time for the depth I: fewer of a deep factor, for a core's second cache.
  static std::int64_t most_columns(std::int64_t depth);

  /// What     For the depth I, not 0, of bf16 even, and at most kMostColumns columns. Without `kernel` plain
  ///          loops compute the same.
  ColumnBlock(std::int64_t depth, std::int64_t columns, bool kernel = has_block_kernel<T>());
  ~ColumnBlock();
  ColumnBlock(const ColumnBlock&) = delete;
  ColumnBlock& operator=(const ColumnBlock&) = delete;

  /// What     From now on the block has so many columns, at most those it was made for; all have to be
  ///          ordered anew.
  void set_columns(std::int64_t columns);
  /// What     Columns [first, first + count) of b become the block's columns from `into` on. Of b either rows
  ///          or columns are contiguous; contiguous columns of bf16 begin at pairs of values.
  void order(const at::Tensor& b_IO, std::int64_t first, std::int64_t count, std::int64_t into);
  /// What     a times the block, valid until the next call.
  /// Shape    a [rows, I], rows <= kRows -> [rows, columns], contiguous.
  const float* multiply(const StridedRows<const T>& a, std::int64_t rows);

 private:
  void multiply_depth(const StridedRows<const T>& a, std::int64_t rows, std::int64_t first,
                      std::int64_t depth);

  std::int64_t depth_;
  std::int64_t columns_;
  std::int64_t room_;  // in columns
  bool kernel_;
  ThreadBuffer ordered_;  // [I, columns] float, or [I / 2, columns] pairs of bf16, one of each of two rows
  ThreadBuffer sums_;     // fp32 [kRows, columns]
};

}  // namespace collegium::ops
