// SPDX-License-Identifier: Apache-2.0
#pragma once

// bf16 products of one thread on AMX tiles, by oneDNN's block kernel, which ATen exports. A whole product of
// ATen's brings both factors into another order and its sums through memory; here some columns of the second
// factor are put in order once for all rows, and sums of a few rows are at hand in the core's first cache.
// Processors without AMX compute the same by plain loops.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

#include "collegium/ops/strided_rows.h"

namespace collegium::ops {

/// When a result is read again: kSoon leaves it in the cache, kLater writes it past the cache, which saves
/// reading the lines that are overwritten.
enum class Reuse { kSoon, kLater };

/// bf16 values of a cache line.
inline constexpr std::int64_t kLineValues = 32;

/// Some columns of a second factor b [K, N] in the order of tiles, and room for the sums of kRows rows.
/// Belongs to one thread.
class TileBlock {
 public:
  static constexpr std::int64_t kRows = 32;
  static constexpr std::int64_t kColumns = 256;

  /// What     Whether this processor has tiles and ATen's oneDNN, which must stay enabled, uses them.
  static bool has_tiles();

  /// What     For the depth K, even and not 0, and at most kColumns columns. `tiles` false = plain loops.
  TileBlock(std::int64_t depth, std::int64_t columns, bool tiles = has_tiles());
  ~TileBlock();
  TileBlock(const TileBlock&) = delete;
  TileBlock& operator=(const TileBlock&) = delete;

  /// What     From now on the block has so many columns, at most those it was made for; all have to be
  ///          ordered anew.
  void set_columns(std::int64_t columns);
  /// What     Columns [first, first + count) of b become the block's columns from `into` on.
  void order(const at::Tensor& b_KN, std::int64_t first, std::int64_t count, std::int64_t into);
  /// What     a times the block, summed in fp32 and rounded once, valid until the next call.
  /// Shape    a [rows, K], rows <= kRows -> [rows, columns], contiguous.
  StridedRows<const c10::BFloat16> multiply(const StridedRows<const c10::BFloat16>& a, std::int64_t rows);
  /// What     Copies such results to where they are read as `reuse` says: by other threads after the block is
  ///          gone.
  void write(const StridedRows<const c10::BFloat16>& results, std::int64_t rows, std::int64_t columns,
             const StridedRows<c10::BFloat16>& to, Reuse reuse);

 private:
  std::int64_t depth_;
  std::int64_t columns_;
  bool tiles_;
  bool wrote_past_cache_ = false;
  at::Tensor ordered_;  // int32 [K / 2, columns]: a pair of b's rows each
  at::Tensor sums_;     // fp32 [kRows, columns]
  at::Tensor rounded_;
};

/// What     Whether the functions here take such factors: bf16 on the CPU, K even and not 0, rows of a
///          contiguous and not overlapping, of b either rows or columns contiguous, columns beginning at
///          pairs of values.
bool tiles_take(const at::Tensor& a_MK, const at::Tensor& b_KN);

/// Where results of a block belong: some rows of a, some columns of every part of b.
struct BlockRange {
  std::int64_t row;
  std::int64_t rows;
  std::int64_t column;
  std::int64_t columns;
};

using BlockResults = StridedRows<const c10::BFloat16>;

/// What     a b on the calling thread, block by block of the result. b is `parts` matrices side by side; a
///          block's results are those of the same columns of each, one part after the other. `use` gets them
///          while they are in the first cache. `before`, unless empty, is told the range before it is
///          multiplied.
/// Shape    a [M, K], b [K, parts N] as tiles_take() says -> results [rows, parts columns].
void product_in_blocks(
    const at::Tensor& a_MK, const at::Tensor& b_KN, std::int64_t parts,
    const std::function<void(const BlockRange&)>& before,
    const std::function<void(TileBlock& block, const BlockResults& results, const BlockRange&)>& use);

/// What     out = a b on the calling thread; a row of `out` depends on that row of `a` alone.
/// Shape    a [M, K], b [K, N] as tiles_take() says, out [M, N] bf16 with contiguous rows.
void tile_product_into(const at::Tensor& a_MK, const at::Tensor& b_KN, const at::Tensor& out_MN, Reuse reuse);

}  // namespace collegium::ops
