// SPDX-License-Identifier: Apache-2.0
#pragma once

// Products block by block of the result (ops/column_block.h), which is at hand in the core's first cache
// before it is written.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

#include "collegium/ops/row_source.h"
#include "collegium/ops/strided_rows.h"

namespace collegium::ops {

/// When a result is read again: kSoon leaves it in the cache, kLater writes it past the cache, which saves
/// reading the lines that are overwritten.
enum class Reuse { kSoon, kLater };

/// What     Copies a block's results to where they are read as `reuse` says, by other threads after
///          product_in_blocks() has returned. T is float or BFloat16.
template <typename T>
void write_block(const StridedRows<const T>& results, std::int64_t rows, std::int64_t columns,
                 const StridedRows<T>& to, Reuse reuse);

/// What     Whether the functions here take such factors: both bf16 or both fp32, on the CPU, I not 0 and of
///          bf16 even, rows of a contiguous and not overlapping, of b either rows or columns contiguous,
///          columns of bf16 beginning at pairs of values; an index only where ColumnBlock::takes_index().
bool blocks_take(const RowSource& a_XI, const RowSource& b_IO);

/// Where results of a block belong: some rows of a, some columns of every part of b.
struct BlockRange {
  std::int64_t row;
  std::int64_t rows;
  std::int64_t column;  ///< of a part; a multiple of 128 where b is one part
  std::int64_t columns;
};

/// Results of type T in the first cache: the same columns of each part of b, one part after the other.
template <typename T>
using UseBlock = std::function<void(const StridedRows<const T>& results, const BlockRange& range)>;

/// What     f<float>() or f<BFloat16>(), for a tensor of either.
template <typename Function>
void with_type_of(const at::Tensor& x, const Function& f) {
  if (x.scalar_type() == at::kFloat) {
    f.template operator()<float>();
  } else {
    f.template operator()<c10::BFloat16>();
  }
}

/// What     a b, block by block; b is `parts` matrices side by side. `use` gets each block's results, rounded
///          once where T is bf16, and those of a row from its first column on. `before`, unless empty, is
///          told the range before it is multiplied. Inside a parallel region all on the calling thread, else
///          some rows on each thread, which calls both.
/// Shape    a [X, I], b [I, parts O] as blocks_take() says -> results [rows, parts columns].
template <typename T>
void product_in_blocks(const RowSource& a_XI, const RowSource& b_IO, std::int64_t parts,
                       const std::function<void(const BlockRange&)>& before, const UseBlock<T>& use);

/// What     out = a b; a row of `out` depends on that row of `a` alone.
/// Shape    a [X, I], b [I, O] as blocks_take() says, out [X, O] bf16 or fp32 with contiguous rows.
void block_product_into(const RowSource& a_XI, const RowSource& b_IO, const at::Tensor& out_XO, Reuse reuse);

}  // namespace collegium::ops
