// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/transpose.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "collegium/base/error.h"
#include "collegium/ops/cpu_features.h"
#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/product.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

// Values of 32 bits that fit a vector, as many rows of them: a square block. Interleaving row i with the one
// half a block further on, as often as its size is a power of two, transposes it.
struct SixteenWords {
  static constexpr std::int64_t kSize = 16;
  static constexpr int kRounds = 4;
  using Line = std::uint32_t __attribute__((vector_size(64)));
  using LineAnywhere = std::uint32_t __attribute__((vector_size(64), aligned(2), may_alias));
  using HalfLine = std::uint16_t __attribute__((vector_size(32)));
  static COLLEGIUM_INLINE void interleave(const Line& a, const Line& b, Line& low, Line& high) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};
struct EightWords {
  static constexpr std::int64_t kSize = 8;
  static constexpr int kRounds = 3;
  using Line = std::uint32_t __attribute__((vector_size(32)));
  using LineAnywhere = std::uint32_t __attribute__((vector_size(32), aligned(2), may_alias));
  using HalfLine = std::uint16_t __attribute__((vector_size(16)));
  static COLLEGIUM_INLINE void interleave(const Line& a, const Line& b, Line& low, Line& high) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};

template <typename Bits>
struct TransposedRows {
  IndexedRows<const Bits> in;
  StridedRows<Bits> out;
};

// Rows of `in` that `size` values of a column take: two of 16 bits make one of 32.
template <typename Bits>
constexpr std::int64_t rows_of_words(std::int64_t size) {
  // NOLINTNEXTLINE(bugprone-sizeof-expression): words of 32 bits are one value
  return size * static_cast<std::int64_t>(sizeof(std::uint32_t) / sizeof(Bits));
}

template <typename Block>
COLLEGIUM_INLINE void load(const std::uint32_t* const* rows, std::int64_t column,
                           typename Block::Line* lines) {
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < Block::kSize; ++i)
    lines[i] = *reinterpret_cast<const typename Block::LineAnywhere*>(rows[i] + column);
}

template <typename Block>
COLLEGIUM_INLINE void load(const std::uint16_t* const* rows, std::int64_t column,
                           typename Block::Line* lines) {
  using Line = typename Block::Line;
  for (std::int64_t i = 0; i < Block::kSize; ++i) {
    typename Block::HalfLine first;
    typename Block::HalfLine second;
    std::memcpy(&first, rows[2 * i] + column, sizeof(first));
    std::memcpy(&second, rows[2 * i + 1] + column, sizeof(second));
    lines[i] = __builtin_convertvector(first, Line) | __builtin_convertvector(second, Line) << 16U;
  }
}

// Loops are unrolled so that lines stay in registers: copied to memory by halves, they were waited for.
template <typename Block, typename Bits>
COLLEGIUM_INLINE void transpose_block(const Bits* const* rows, std::int64_t column,
                                      const StridedRows<Bits>& out) {
  constexpr std::int64_t kSize = Block::kSize;
  typename Block::Line lines[kSize];
  load<Block>(rows, column, lines);
#pragma GCC unroll 4
  for (int round = 0; round < Block::kRounds; ++round) {
    typename Block::Line last[kSize];
#pragma GCC unroll 16
    for (std::int64_t i = 0; i < kSize; ++i) last[i] = lines[i];
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < kSize / 2; ++i)
      Block::interleave(last[i], last[i + kSize / 2], lines[2 * i], lines[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < kSize; ++i)
    *reinterpret_cast<typename Block::LineAnywhere*>(out.at(i, 0)) = lines[i];
}

template <typename Bits>
COLLEGIUM_INLINE void transpose_one_by_one(const TransposedRows<Bits>& o, std::int64_t first_row,
                                           std::int64_t end_row, std::int64_t first_column,
                                           std::int64_t end_column) {
  for (std::int64_t row = first_row; row < end_row; ++row) {
    for (std::int64_t column = first_column; column < end_column; ++column)
      *o.out.at(column, row) = *o.in.at(row, column);
  }
}

// As many rows at a time as fill a cache line of `out`.
template <typename Block, typename Bits>
COLLEGIUM_INLINE void transpose_all(const TransposedRows<Bits>& o, std::int64_t num_rows,
                                    std::int64_t num_columns) {
  constexpr std::int64_t kStep = rows_of_words<Bits>(SixteenWords::kSize);
  const std::int64_t whole_rows = num_rows / kStep * kStep;
  const std::int64_t whole_columns = num_columns / Block::kSize * Block::kSize;
  for (std::int64_t first = 0; first < whole_rows; first += kStep) {
    const Bits* rows[kStep];
    for (std::int64_t i = 0; i < kStep; ++i) rows[i] = o.in.at(first + i, 0);
    for (std::int64_t column = 0; column < whole_columns; column += Block::kSize) {
      for (std::int64_t i = 0; i < kStep; i += rows_of_words<Bits>(Block::kSize))
        transpose_block<Block>(rows + i, column, o.out.from(column, first + i));
    }
    transpose_one_by_one(o, first, first + kStep, whole_columns, num_columns);
  }
  transpose_one_by_one(o, whole_rows, num_rows, 0, num_columns);
}

template <typename Bits>
struct Size {
  TransposedRows<Bits> all;
  std::int64_t rows;
  std::int64_t columns;
};
COLLEGIUM_CLONES void by_sixteen(const Size<std::uint16_t>& o) {
  transpose_all<SixteenWords>(o.all, o.rows, o.columns);
}
COLLEGIUM_CLONES void by_sixteen(const Size<std::uint32_t>& o) {
  transpose_all<SixteenWords>(o.all, o.rows, o.columns);
}
COLLEGIUM_CLONES void by_eight(const Size<std::uint16_t>& o) {
  transpose_all<EightWords>(o.all, o.rows, o.columns);
}
COLLEGIUM_CLONES void by_eight(const Size<std::uint32_t>& o) {
  transpose_all<EightWords>(o.all, o.rows, o.columns);
}

// Sixteen lines of 64 bytes are more than the registers of a core without AVX-512.
template <typename Bits>
void transpose_rows(const TransposedRows<Bits>& o, std::int64_t num_rows, std::int64_t num_columns) {
  static const bool wide = cpu_has("avx512_f");
  const Size<Bits> all{.all = o, .rows = num_rows, .columns = num_columns};
  wide ? by_sixteen(all) : by_eight(all);
}

template <typename Bits>
void transpose_tensor(const RowSource& in_XY, const at::Tensor& out_YX) {
  const at::Tensor& values = in_XY.values_XD;
  const StridedRows<const Bits> rows{static_cast<const Bits*>(values.const_data_ptr()), values.stride(0)};
  transpose_rows(
      TransposedRows<Bits>{.in = {rows, in_XY.index()},
                           .out = {static_cast<Bits*>(out_YX.mutable_data_ptr()), out_YX.stride(0)}},
      in_XY.rows(), in_XY.width());
}

}  // namespace

void transpose_into(const RowSource& in_XY, const at::Tensor& out_YX) {
  COLLEGIUM_CHECK(in_XY.rows() == out_YX.size(1) && in_XY.width() == out_YX.size(0) &&
                      in_XY.values_XD.scalar_type() == out_YX.scalar_type(),
                  "transpose_into: shapes or dtypes do not match");
  const auto bytes = out_YX.element_size();
  if (bytes != sizeof(std::uint16_t) && bytes != sizeof(std::uint32_t)) {
    out_YX.copy_(in_XY.tensor().t());
    return;
  }
  if (out_YX.numel() == 0) return;
  COLLEGIUM_CHECK(in_XY.values_XD.stride(1) == 1 && out_YX.stride(1) == 1,
                  "transpose_into: rows must be contiguous");
  if (bytes == sizeof(std::uint16_t)) return transpose_tensor<std::uint16_t>(in_XY, out_YX);
  transpose_tensor<std::uint32_t>(in_XY, out_YX);
}

void transpose_words(const StridedRows<const std::uint32_t>& in, std::int64_t rows, std::int64_t words,
                     const StridedRows<std::uint32_t>& out) {
  transpose_rows(TransposedRows<std::uint32_t>{.in = in, .out = out}, rows, words);
}

std::int64_t WorkerTransposes::values(std::int64_t rows, std::int64_t columns) {
  return rounded_rows(rows) * columns;
}

WorkerTransposes::WorkerTransposes(const at::TensorOptions& options, std::int64_t most_values) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  if (!product_ways().blocks || (dtype != at::kBFloat16 && dtype != at::kFloat)) return;
  buffers_ = at::empty({at::get_num_threads(), most_values}, options);
}

at::Tensor WorkerTransposes::of(const RowSource& rows_ZO, std::int64_t worker) const {
  if (!buffers_.defined()) return rows_ZO.tensor().t();
  const std::int64_t rows = rows_ZO.rows();
  const std::int64_t columns = rows_ZO.width();
  const at::Tensor turned = buffers_.select(0, worker)
                                .view(rows_ZO.values_XD.scalar_type())
                                .narrow(0, 0, values(rows, columns))
                                .view({columns, rounded_rows(rows)})
                                .narrow(1, 0, rows);
  transpose_into(rows_ZO, turned);
  return turned;
}

}  // namespace collegium::ops
