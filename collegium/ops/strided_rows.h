// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "collegium/base/error.h"

namespace collegium::ops {

/// Bytes of a cache line.
inline constexpr std::int64_t kLineBytes = 64;

/// Rows whose columns are contiguous and that lie `stride` values apart; null where there are none.
template <typename T>
struct StridedRows {
  T* values = nullptr;
  std::int64_t stride = 0;

  T* at(std::int64_t row, std::int64_t column) const {
    return values == nullptr ? nullptr : values + row * stride + column;
  }
  /// What     The same rows without the first ones, and their columns without the first ones.
  StridedRows from(std::int64_t row, std::int64_t column) const { return {at(row, column), stride}; }
};

/// Rows that lie `stride` values apart, in the order of an index where there is one: read where they lie.
template <typename T>
struct IndexedRows {
  StridedRows<T> rows;
  const std::int32_t* index = nullptr;

  // NOLINTNEXTLINE(google-explicit-constructor): rows without an index are such rows too
  IndexedRows(const StridedRows<T>& of, const std::int32_t* by = nullptr) : rows(of), index(by) {}

  T* at(std::int64_t row, std::int64_t column) const {
    return rows.at(index == nullptr ? row : std::int64_t{index[row]}, column);
  }
  /// What     The same rows without the first ones, and their columns without the first ones.
  IndexedRows from(std::int64_t row, std::int64_t column) const {
    if (index == nullptr) return rows.from(row, column);
    return {rows.from(0, column), index + row};
  }
};

/// What     A matrix with contiguous rows; null for an undefined tensor.
template <typename T>
StridedRows<const T> rows_of(const at::Tensor& rows_XY) {
  if (!rows_XY.defined()) return {};
  COLLEGIUM_CHECK(rows_XY.stride(1) == 1 || rows_XY.size(1) == 1, "rows must be contiguous");
  return {rows_XY.const_data_ptr<T>(), rows_XY.stride(0)};
}
/// The same to write to.
template <typename T>
StridedRows<T> mutable_rows_of(const at::Tensor& rows_XY) {
  if (!rows_XY.defined()) return {};
  COLLEGIUM_CHECK(rows_XY.stride(1) == 1 || rows_XY.size(1) == 1, "rows must be contiguous");
  return {rows_XY.mutable_data_ptr<T>(), rows_XY.stride(0)};
}

}  // namespace collegium::ops
