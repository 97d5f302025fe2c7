// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/transpose.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "collegium/base/error.h"
#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/product.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

// Sixteen rows of sixteen values of 32 bits: a row is a cache line.
constexpr std::int64_t kBlock = 16;
using Line = std::uint32_t __attribute__((vector_size(4 * kBlock)));
using HalfLine = std::uint16_t __attribute__((vector_size(2 * kBlock)));
struct Block {
  Line rows[kBlock];
};

template <typename Bits>
struct Rows {
  const Bits* in;
  std::int64_t in_stride;
  Bits* out;
  std::int64_t out_stride;
};

// Rows of `in` that a block holds: two values of 16 bits, of one column, make one of 32.
template <typename Bits>
constexpr std::int64_t kRowsOfBlock = kBlock * sizeof(std::uint32_t) / sizeof(Bits);

COLLEGIUM_INLINE void load(const Rows<std::uint32_t>& o, std::int64_t row, std::int64_t column,
                           Block& block) {
  for (std::int64_t i = 0; i < kBlock; ++i)
    std::memcpy(&block.rows[i], o.in + (row + i) * o.in_stride + column, sizeof(Line));
}

COLLEGIUM_INLINE void load(const Rows<std::uint16_t>& o, std::int64_t row, std::int64_t column,
                           Block& block) {
  for (std::int64_t i = 0; i < kBlock; ++i) {
    const std::uint16_t* in = o.in + (row + 2 * i) * o.in_stride + column;
    HalfLine first;
    HalfLine second;
    std::memcpy(&first, in, sizeof(first));
    std::memcpy(&second, in + o.in_stride, sizeof(second));
    block.rows[i] = __builtin_convertvector(first, Line) | __builtin_convertvector(second, Line) << 16U;
  }
}

// Four rounds, each of which interleaves row i with row i + 8.
template <typename Bits>
COLLEGIUM_INLINE void transpose_block(const Rows<Bits>& o, std::int64_t row, std::int64_t column) {
  Block block;
  load(o, row, column, block);
  for (int round = 0; round < 4; ++round) {
    const Block last = block;
    for (std::int64_t i = 0; i < kBlock / 2; ++i) {
      const Line a = last.rows[i];
      const Line b = last.rows[i + kBlock / 2];
      block.rows[2 * i] =
          __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      block.rows[2 * i + 1] =
          __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }
  for (std::int64_t i = 0; i < kBlock; ++i)
    std::memcpy(o.out + (column + i) * o.out_stride + row, &block.rows[i], sizeof(Line));
}

template <typename Bits>
COLLEGIUM_INLINE void transpose_one_by_one(const Rows<Bits>& o, std::int64_t first_row, std::int64_t end_row,
                                           std::int64_t first_column, std::int64_t end_column) {
  for (std::int64_t row = first_row; row < end_row; ++row) {
    for (std::int64_t column = first_column; column < end_column; ++column)
      o.out[column * o.out_stride + row] = o.in[row * o.in_stride + column];
  }
}

template <typename Bits>
COLLEGIUM_INLINE void transpose_all(const Rows<Bits>& o, std::int64_t num_rows, std::int64_t num_columns) {
  const std::int64_t whole_rows = num_rows / kRowsOfBlock<Bits> * kRowsOfBlock<Bits>;
  const std::int64_t whole_columns = num_columns / kBlock * kBlock;
  for (std::int64_t row = 0; row < whole_rows; row += kRowsOfBlock<Bits>) {
    for (std::int64_t column = 0; column < whole_columns; column += kBlock) transpose_block(o, row, column);
    transpose_one_by_one(o, row, row + kRowsOfBlock<Bits>, whole_columns, num_columns);
  }
  transpose_one_by_one(o, whole_rows, num_rows, 0, num_columns);
}

COLLEGIUM_CLONES void transpose_rows(const Rows<std::uint16_t>& o, std::int64_t num_rows,
                                     std::int64_t num_columns) {
  transpose_all(o, num_rows, num_columns);
}
COLLEGIUM_CLONES void transpose_rows(const Rows<std::uint32_t>& o, std::int64_t num_rows,
                                     std::int64_t num_columns) {
  transpose_all(o, num_rows, num_columns);
}

template <typename Bits>
void transpose_tensor(const at::Tensor& in_XY, const at::Tensor& out_YX) {
  transpose_rows({.in = static_cast<const Bits*>(in_XY.const_data_ptr()),
                  .in_stride = in_XY.stride(0),
                  .out = static_cast<Bits*>(out_YX.mutable_data_ptr()),
                  .out_stride = out_YX.stride(0)},
                 in_XY.size(0), in_XY.size(1));
}

}  // namespace

void transpose_into(const at::Tensor& in_XY, const at::Tensor& out_YX) {
  COLLEGIUM_CHECK(in_XY.dim() == 2 && out_YX.dim() == 2 && in_XY.size(0) == out_YX.size(1) &&
                      in_XY.size(1) == out_YX.size(0) && in_XY.scalar_type() == out_YX.scalar_type(),
                  "transpose_into: shapes or dtypes do not match");
  const auto bytes = in_XY.element_size();
  if (bytes != sizeof(std::uint16_t) && bytes != sizeof(std::uint32_t)) {
    out_YX.copy_(in_XY.t());
    return;
  }
  if (in_XY.numel() == 0) return;
  COLLEGIUM_CHECK(in_XY.stride(1) == 1 && out_YX.stride(1) == 1, "transpose_into: rows must be contiguous");
  if (bytes == sizeof(std::uint16_t)) return transpose_tensor<std::uint16_t>(in_XY, out_YX);
  transpose_tensor<std::uint32_t>(in_XY, out_YX);
}

void transpose_words(const StridedRows<const std::uint32_t>& in, std::int64_t rows, std::int64_t words,
                     const StridedRows<std::uint32_t>& out) {
  transpose_rows({.in = in.values, .in_stride = in.stride, .out = out.values, .out_stride = out.stride}, rows,
                 words);
}

std::int64_t WorkerTransposes::values(std::int64_t rows, std::int64_t columns) {
  return rounded_rows(rows) * columns;
}

WorkerTransposes::WorkerTransposes(const at::TensorOptions& options, std::int64_t most_values) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (!product_ways().blocks || (dtype != at::kBFloat16 && dtype != at::kFloat)) return;
  buffers_ = at::empty({at::get_num_threads(), most_values}, options);
}

at::Tensor WorkerTransposes::of(const at::Tensor& rows_ZO, std::int64_t worker) const {
  if (!buffers_.defined()) return rows_ZO.t();
  const std::int64_t rows = rows_ZO.size(0);
  const std::int64_t columns = rows_ZO.size(1);
  const at::Tensor turned = buffers_.select(0, worker)
                                .view(rows_ZO.scalar_type())
                                .narrow(0, 0, values(rows, columns))
                                .view({columns, rounded_rows(rows)})
                                .narrow(1, 0, rows);
  transpose_into(rows_ZO, turned);
  return turned;
}

}  // namespace collegium::ops
