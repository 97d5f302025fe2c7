// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/column_block.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <array>
#include <exception>
#include <type_traits>

#include "collegium/base/error.h"
#include "collegium/ops/cpu_features.h"
#include "collegium/ops/panel_product.h"
#include "collegium/ops/row_math.h"
#include "collegium/ops/transpose.h"

namespace collegium::ops {

namespace {

using Bf16 = c10::BFloat16;

// The sums of a block of oneDNN's are 16 or 32 KiB, for the first cache; ordered columns of up to 2048 fp32
// or 4096 bf16 values have at most 1 MiB, for the second. Of {16, 24, 32, 64} rows and {128, 192, 256}
// columns these were among the best for each of the experts' products, coarse and fine, on a core with
// AVX-512-bf16, and with AMX of more.
constexpr std::int64_t kKernelRows = 32;
constexpr std::int64_t kOrderedBytes = std::int64_t{1} << 20;
constexpr std::int64_t kMostDepth = 1024;
// Of an AMX instruction. A kernel is made for every size, in 0.1 ms, and takes 20 KB of every thread that
// uses it. Depths that are an expert's rows differ in every step: what is left over is multiplied apart, so
// that they are few.
constexpr std::int64_t kDepthStep = 32;

// Of panels: eight whole tiles of rows, 5 to 8 % faster than 32 rows or than sums that are kept in the first
// cache; a panel of this depth fills it. Of {128, 256, 512, 1024} deep and {32, 48, 96} rows, with AVX2.
constexpr std::int64_t kPanelRows = 48;
constexpr std::int64_t kPanelDepth = 512;

template <typename T>
constexpr std::int64_t kValuesOfWord = sizeof(std::uint32_t) / sizeof(T);

template <typename T>
using Bits = std::conditional_t<std::is_same_v<T, float>, std::uint32_t, std::uint16_t>;

struct Order {
  std::int64_t depth;
  std::int64_t columns;
  std::uint32_t* out;
  std::int64_t out_stride;
};

COLLEGIUM_CLONES void order_rows(const IndexedRows<const std::uint16_t>& b, const Order& o) {
  for (std::int64_t k = 0; k < o.depth; k += 2) {
    const std::uint16_t* in = b.at(k, 0);
    const std::uint16_t* next = b.at(k + 1, 0);
    std::uint32_t* __restrict__ pairs = o.out + k / 2 * o.out_stride;
    for (std::int64_t n = 0; n < o.columns; ++n)
      pairs[n] = static_cast<std::uint32_t>(in[n]) | static_cast<std::uint32_t>(next[n]) << 16U;
  }
}

void order_rows(const IndexedRows<const std::uint32_t>& b, const Order& o) {
  for (std::int64_t k = 0; k < o.depth; ++k) std::copy_n(b.at(k, 0), o.columns, o.out + k * o.out_stride);
}

// A whole panel: short rows of a known width are copied without a call for each.
COLLEGIUM_CLONES void order_panel(const IndexedRows<const std::uint32_t>& b, std::int64_t depth,
                                  std::uint32_t* __restrict__ out) {
  for (std::int64_t k = 0; k < depth; ++k, out += kPanelColumns) {
    const std::uint32_t* in = b.at(k, 0);
    for (std::int64_t n = 0; n < kPanelColumns; ++n) out[n] = in[n];
  }
}

// Columns of b, whose rows or columns are contiguous, in `out`'s order.
template <typename T>
void order_columns(const RowSource& b_IO, std::int64_t first, const Order& o) {
  const at::Tensor& values = b_IO.values_XD;
  const auto* in = static_cast<const Bits<T>*>(values.const_data_ptr()) + first * values.stride(1);
  if (values.stride(1) != 1) {
    transpose_words(
        {.values = reinterpret_cast<const std::uint32_t*>(in), .stride = values.stride(1) / kValuesOfWord<T>},
        o.columns, o.depth / kValuesOfWord<T>, {.values = o.out, .stride = o.out_stride});
    return;
  }
  const IndexedRows<const Bits<T>> rows({in, values.stride(0)}, b_IO.index());
  if constexpr (std::is_same_v<T, float>) {
    if (o.columns == kPanelColumns && o.out_stride == kPanelColumns) return order_panel(rows, o.depth, o.out);
  }
  order_rows(rows, o);
}

// fp32 without oneDNN's kernel.
template <typename T>
bool in_panels(bool kernel) {
  return std::is_same_v<T, float> && !kernel;
}

// What brgemm() computes.
COLLEGIUM_CLONES void plain_product(const StridedRows<const Bf16>& a, std::int64_t rows, std::int64_t columns,
                                    std::int64_t depth, const Bf16* ordered, float* sums) {
  for (std::int64_t row = 0; row < rows; ++row, sums += columns) {
    for (std::int64_t k = 0; k < depth; ++k) {
      const float left = row_math::widen(*a.at(row, k));
      const Bf16* values = ordered + k / 2 * 2 * columns + k % 2;
      for (std::int64_t n = 0; n < columns; ++n) sums[n] += left * row_math::widen(values[2 * n]);
    }
  }
}

template <typename T>
bool multiplies_blocks() {
  constexpr std::int64_t kColumns = 16;
  constexpr std::int64_t kGroup = kValuesOfWord<T>;
  const std::array<T, 2> a = {T{1.0F}, T{2.0F}};
  std::array<T, 2 * kColumns> ordered;
  for (std::int64_t i = 0; i < 2 * kColumns; ++i) {
    const std::int64_t k = kGroup == 2 ? i % 2 : i / kColumns;
    ordered[static_cast<std::size_t>(i)] = T{k == 0 ? 3.0F : 5.0F};
  }
  std::array<float, kColumns> sums{};
  try {
    at::native::cpublas::brgemm(1, kColumns, 2, 2, kColumns, kColumns, false, a.data(), ordered.data(),
                                sums.data());
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {  // ATen's or oneDNN's
    return false;
  }
  return std::all_of(sums.begin(), sums.end(), [](float sum) { return sum == 13.0F; });
}

}  // namespace

template <typename T>
bool has_block_kernel() {
  // In fp32 ATen answers the kernel's call by its whole product where oneDNN may not.
  static const bool found = (!std::is_same_v<T, float> || cpu_has("avx512_f")) &&
                            at::globalContext().userEnabledMkldnn() && multiplies_blocks<T>();
  return found;
}

template <typename T>
std::int64_t ColumnBlock<T>::most_rows(bool kernel) {
  return in_panels<T>(kernel) ? kPanelRows : kKernelRows;
}

template <typename T>
bool ColumnBlock<T>::takes_index(bool kernel) {
  return in_panels<T>(kernel);
}

template <typename T>
std::int64_t ColumnBlock<T>::most_columns(std::int64_t depth) {
  const std::int64_t bytes = depth * static_cast<std::int64_t>(sizeof(T));
  return bytes * kMostColumns < kOrderedBytes ? kMostColumns : kLeastColumns;
}

template <typename T>
ColumnBlock<T>::ColumnBlock(std::int64_t depth, std::int64_t columns, bool kernel)
    : depth_(depth),
      columns_(columns),
      room_(columns),
      kernel_(kernel),
      ordered_((columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns * depth *
               static_cast<std::int64_t>(sizeof(T))),
      sums_(most_rows(kernel) * columns * static_cast<std::int64_t>(sizeof(float))) {
  COLLEGIUM_CHECK(depth > 0 && depth % kValuesOfWord<T> == 0 && columns <= kMostColumns,
                  "ColumnBlock: {} rows, {} columns", depth, columns);
}

template <typename T>
ColumnBlock<T>::~ColumnBlock() {
  if (kernel_) at::native::cpublas::brgemm_release();
}

template <typename T>
void ColumnBlock<T>::set_columns(std::int64_t columns) {
  COLLEGIUM_CHECK(columns <= room_, "{} columns in a block of {}", columns, room_);
  columns_ = columns;
}

template <typename T>
void ColumnBlock<T>::order(const RowSource& b_IO, std::int64_t first, std::int64_t count, std::int64_t into) {
  COLLEGIUM_CHECK(b_IO.rows() == depth_ && first + count <= b_IO.width() && into + count <= columns_,
                  "{} columns from {} of [{}, {}] for a block [{}, {}] at {}", count, first, b_IO.rows(),
                  b_IO.width(), depth_, columns_, into);
  COLLEGIUM_CHECK(!b_IO.index_R.defined() || b_IO.values_XD.stride(1) == 1,
                  "an index of rows that are not contiguous");
  auto* ordered = ordered_.template data<std::uint32_t>();
  if (!in_panels<T>(kernel_)) {
    order_columns<T>(b_IO, first,
                     {.depth = depth_, .columns = count, .out = ordered + into, .out_stride = columns_});
    return;
  }
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t column = into + done;
    const std::int64_t lane = column % kPanelColumns;
    const std::int64_t some = std::min(kPanelColumns - lane, count - done);
    order_columns<T>(b_IO, first + done,
                     {.depth = depth_,
                      .columns = some,
                      .out = ordered + (column - lane) * depth_ + lane,
                      .out_stride = kPanelColumns});
    done += some;
  }
}

template <typename T>
const float* ColumnBlock<T>::multiply(const IndexedRows<const T>& a, std::int64_t rows) {
  COLLEGIUM_CHECK(rows <= most_rows(kernel_), "{} rows in a block of {}", rows, most_rows(kernel_));
  COLLEGIUM_CHECK(a.index == nullptr || takes_index(kernel_), "an index where there are no panels");
  const std::int64_t most_depth = in_panels<T>(kernel_) ? kPanelDepth : kMostDepth;
  const std::int64_t steps = depth_ / kDepthStep;
  const std::int64_t parts = (depth_ + most_depth - 1) / most_depth;
  std::int64_t first = 0;
  for (std::int64_t part = 1; part <= parts; ++part) {
    const std::int64_t end = steps * part / parts * kDepthStep;
    if (end > first) multiply_depth(a, rows, first, end - first);
    first = end;
  }
  if (first < depth_) multiply_depth(a, rows, first, depth_ - first);
  return sums_.template data<float>();
}

template <typename T>
void ColumnBlock<T>::multiply_depth(const IndexedRows<const T>& a, std::int64_t rows, std::int64_t first,
                                    std::int64_t depth) {
  const auto* ordered = ordered_.template data<const T>();
  auto* sums = sums_.template data<float>();
  const bool adds = first > 0;
  if (kernel_) {
    const std::int64_t stride = std::max(a.rows.stride, depth_);  // a single row's may be anything
    at::native::cpublas::brgemm(rows, columns_, depth, stride, columns_, columns_, adds, a.at(0, first),
                                ordered + first * columns_, sums);
  } else if constexpr (std::is_same_v<T, float>) {
    for (std::int64_t column = 0; column < columns_; column += kPanelColumns)
      panel_product(a.from(0, first), rows, ordered + column * depth_ + first * kPanelColumns, depth,
                    {.values = sums + column, .stride = columns_}, std::min(kPanelColumns, columns_ - column),
                    adds);
  } else {
    if (!adds) std::fill_n(sums, rows * columns_, 0.0F);
    plain_product(a.rows.from(0, first), rows, columns_, depth, ordered + first * columns_, sums);
  }
}

template bool has_block_kernel<float>();
template bool has_block_kernel<Bf16>();
template class ColumnBlock<float>;
template class ColumnBlock<Bf16>;

}  // namespace collegium::ops
