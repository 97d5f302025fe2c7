// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/transpose.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "collegium/base/error.h"
#include "collegium/ops/product.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

constexpr std::int64_t kBlock = 8;   // rows and columns that vectors hold
constexpr std::int64_t kStrip = 32;  // rows whose transpose fills cache lines
using Vector = std::uint16_t __attribute__((vector_size(2 * kBlock)));

struct Rows {
  const std::uint16_t* in;
  std::int64_t in_stride;
  std::uint16_t* out;
  std::int64_t out_stride;
};

// Three rounds, each of which interleaves row i with row i + 4.
COLLEGIUM_INLINE void transpose_block(const Rows& o, std::int64_t row, std::int64_t column) {
  struct Block {
    Vector rows[kBlock];
  } block;
  for (std::int64_t i = 0; i < kBlock; ++i)
    std::memcpy(&block.rows[i], o.in + (row + i) * o.in_stride + column, sizeof(Vector));
  for (int round = 0; round < 3; ++round) {
    const Block last = block;
    for (std::int64_t i = 0; i < kBlock / 2; ++i) {
      const Vector a = last.rows[i];
      const Vector b = last.rows[i + kBlock / 2];
      block.rows[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      block.rows[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
  }
  for (std::int64_t i = 0; i < kBlock; ++i)
    std::memcpy(o.out + (column + i) * o.out_stride + row, &block.rows[i], sizeof(Vector));
}

COLLEGIUM_INLINE void transpose_one_by_one(const Rows& o, std::int64_t first_row, std::int64_t end_row,
                                           std::int64_t first_column, std::int64_t end_column) {
  for (std::int64_t row = first_row; row < end_row; ++row) {
    for (std::int64_t column = first_column; column < end_column; ++column)
      o.out[column * o.out_stride + row] = o.in[row * o.in_stride + column];
  }
}

COLLEGIUM_CLONES void transpose_rows(const Rows& o, std::int64_t num_rows, std::int64_t num_columns) {
  const std::int64_t whole_columns = num_columns / kBlock * kBlock;
  for (std::int64_t strip = 0; strip < num_rows; strip += kStrip) {
    const std::int64_t end = std::min(strip + kStrip, num_rows);
    const std::int64_t whole_end = strip + (end - strip) / kBlock * kBlock;
    for (std::int64_t column = 0; column < whole_columns; column += kBlock) {
      for (std::int64_t row = strip; row < whole_end; row += kBlock) transpose_block(o, row, column);
    }
    transpose_one_by_one(o, strip, whole_end, whole_columns, num_columns);
    transpose_one_by_one(o, whole_end, end, 0, num_columns);
  }
}

const std::uint16_t* bits(const at::Tensor& tensor) {
  return static_cast<const std::uint16_t*>(tensor.const_data_ptr());
}

}  // namespace

void transpose_into(const at::Tensor& in_XY, const at::Tensor& out_YX) {
  COLLEGIUM_CHECK(in_XY.dim() == 2 && out_YX.dim() == 2 && in_XY.size(0) == out_YX.size(1) &&
                      in_XY.size(1) == out_YX.size(0) && in_XY.scalar_type() == out_YX.scalar_type(),
                  "transpose_into: shapes or dtypes do not match");
  if (in_XY.scalar_type() != at::kBFloat16) {
    out_YX.copy_(in_XY.t());
    return;
  }
  if (in_XY.numel() == 0) return;
  COLLEGIUM_CHECK(in_XY.stride(1) == 1 && out_YX.stride(1) == 1, "transpose_into: rows must be contiguous");
  transpose_rows({.in = bits(in_XY),
                  .in_stride = in_XY.stride(0),
                  .out = static_cast<std::uint16_t*>(out_YX.mutable_data_ptr()),
                  .out_stride = out_YX.stride(0)},
                 in_XY.size(0), in_XY.size(1));
}

WorkerTransposes::WorkerTransposes(const at::Tensor& like, std::int64_t most_values) {
  if (like.scalar_type() != at::kBFloat16 || bf16_products() != Bf16Products::kTiles) return;
  buffers_ = at::empty({at::get_num_threads(), most_values}, like.options());
}

at::Tensor WorkerTransposes::of(const at::Tensor& rows_ZO, std::int64_t worker) const {
  if (!buffers_.defined()) return rows_ZO.t();
  const at::Tensor turned =
      buffers_.select(0, worker).narrow(0, 0, rows_ZO.numel()).view({rows_ZO.size(1), rows_ZO.size(0)});
  transpose_into(rows_ZO, turned);
  return turned;
}

}  // namespace collegium::ops
