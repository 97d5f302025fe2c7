// SPDX-License-Identifier: Apache-2.0
#pragma once

// Some columns of a product's second factor in the order of a block kernel: oneDNN's, which ATen exports, or
// in fp32 that of ops/panel_product.h. A whole product of ATen's brings both factors into another order and
// its sums through memory; here some columns are put in order once for all rows, and sums of a few rows are
// at hand in the core's caches.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "collegium/ops/row_source.h"
#include "collegium/ops/strided_rows.h"
#include "collegium/ops/thread_buffer.h"

namespace collegium::ops {

/// What     Whether oneDNN's kernel multiplies blocks of T (float or BFloat16) here: of float only with
///          AVX-512, as with AVX2 alone panels are faster. Found once, by a small product; ATen's oneDNN must
///          stay as enabled as it was.
template <typename T>
bool has_block_kernel();

/// Columns of b [I, O] in order, and room for the sums of most_rows() rows. T is float or BFloat16; sums are
/// fp32. Belongs to one thread.
template <typename T>
class ColumnBlock {
 public:
  /// Columns are a multiple of kLeastColumns, or all of a smaller factor.
  static constexpr std::int64_t kLeastColumns = 128;
  static constexpr std::int64_t kMostColumns = 256;

  /// What     Rows at a time.
  static std::int64_t most_rows(bool kernel = has_block_kernel<T>());
  /// What     Columns at a time for the depth I: fewer of a deep factor, for a core's second cache.
  static std::int64_t most_columns(std::int64_t depth);

  /// What     Whether rows of either factor may have an index: panels are ordered and multiplied row by row.
  static bool takes_index(bool kernel = has_block_kernel<T>());

  /// What     For the depth I, not 0, of bf16 even, and at most kMostColumns columns. Without `kernel` panels
  ///          (float) or plain loops (BFloat16) compute the same.
  ColumnBlock(std::int64_t depth, std::int64_t columns, bool kernel = has_block_kernel<T>());
  ~ColumnBlock();
  ColumnBlock(const ColumnBlock&) = delete;
  ColumnBlock& operator=(const ColumnBlock&) = delete;

  /// What     From now on the block has so many columns, at most those it was made for; all have to be
  ///          ordered anew.
  void set_columns(std::int64_t columns);
  /// What     Columns [first, first + count) of b become the block's columns from `into` on. Of b either rows
  ///          or columns are contiguous; contiguous columns of bf16 begin at pairs of values.
  void order(const RowSource& b_IO, std::int64_t first, std::int64_t count, std::int64_t into);
  /// What     a times the block, valid until the next call.
  /// Shape    a [rows, I], rows <= most_rows() -> [rows, columns], contiguous.
  const float* multiply(const IndexedRows<const T>& a, std::int64_t rows);

 private:
  void multiply_depth(const IndexedRows<const T>& a, std::int64_t rows, std::int64_t first,
                      std::int64_t depth);

  std::int64_t depth_;
  std::int64_t columns_;
  std::int64_t room_;  // in columns
  bool kernel_;
  // [I, columns] float, or [I / 2, columns] pairs of bf16, one of each of two rows; or panels of float, one
  // after the other.
  ThreadBuffer ordered_;
  ThreadBuffer sums_;  // fp32 [most_rows(), columns]
};

}  // namespace collegium::ops
