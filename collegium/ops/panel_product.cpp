// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/panel_product.h"

#include <algorithm>
#include <array>

#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

// Two vectors of eight are a row of a panel. Sums of six rows are 12 of AVX2's 16 registers, the panel's row
// two more, a value of `a` one: enough multiplications under way to hide that each takes four cycles.
constexpr std::int64_t kMostTileRows = 6;
using Eight = float __attribute__((vector_size(32)));

struct Tile {
  IndexedRows<const float> a;
  const float* panel;
  std::int64_t depth;
  StridedRows<float> sums;
  bool adds;
};

using EightAnywhere = float __attribute__((vector_size(32), aligned(4), may_alias));

COLLEGIUM_INLINE const EightAnywhere* eight(const float* values) {
  return reinterpret_cast<const EightAnywhere*>(values);
}
COLLEGIUM_INLINE EightAnywhere* eight(float* values) { return reinterpret_cast<EightAnywhere*>(values); }

template <std::int64_t kRows>
COLLEGIUM_INLINE void multiply_tile(const Tile& o) {
  const float* a[kRows];
#pragma GCC unroll 6
  for (std::int64_t r = 0; r < kRows; ++r) a[r] = o.a.at(r, 0);
  float* out = o.sums.values;
  const std::int64_t out_stride = o.sums.stride;
  Eight left[kRows];
  Eight right[kRows];
  if (o.adds) {
#pragma GCC unroll 6
    for (std::int64_t r = 0; r < kRows; ++r) {
      left[r] = *eight(out + r * out_stride);
      right[r] = *eight(out + r * out_stride + kPanelColumns / 2);
    }
  } else {
#pragma GCC unroll 6
    for (std::int64_t r = 0; r < kRows; ++r) {
      left[r] = Eight{};
      right[r] = Eight{};
    }
  }
  const float* line = o.panel;
  for (std::int64_t k = 0; k < o.depth; ++k, line += kPanelColumns) {
    const Eight left_values = *eight(line);
    const Eight right_values = *eight(line + kPanelColumns / 2);
#pragma GCC unroll 6
    for (std::int64_t r = 0; r < kRows; ++r) {
      const float value = a[r][k];
      left[r] += value * left_values;
      right[r] += value * right_values;
    }
  }
#pragma GCC unroll 6
  for (std::int64_t r = 0; r < kRows; ++r) {
    *eight(out + r * out_stride) = left[r];
    *eight(out + r * out_stride + kPanelColumns / 2) = right[r];
  }
}

// Rows shared out evenly, 32 as 6 6 5 5 5 5: a tile of two would take as long as one of four.
COLLEGIUM_CLONES void multiply_rows(Tile o, std::int64_t rows) {
  std::int64_t tiles = (rows + kMostTileRows - 1) / kMostTileRows;
  while (rows > 0) {
    const std::int64_t count = (rows + tiles - 1) / tiles;
    switch (count) {
      case 6:
        multiply_tile<6>(o);
        break;
      case 5:
        multiply_tile<5>(o);
        break;
      case 4:
        multiply_tile<4>(o);
        break;
      case 3:
        multiply_tile<3>(o);
        break;
      case 2:
        multiply_tile<2>(o);
        break;
      default:
        multiply_tile<1>(o);
    }
    o.a = o.a.from(count, 0);
    o.sums = o.sums.from(count, 0);
    rows -= count;
    --tiles;
  }
}

}  // namespace

void panel_product(const IndexedRows<const float>& a, std::int64_t rows, const float* panel,
                   std::int64_t depth, const StridedRows<float>& sums, std::int64_t columns, bool adds) {
  if (columns == kPanelColumns) {
    multiply_rows({.a = a, .panel = panel, .depth = depth, .sums = sums, .adds = adds}, rows);
    return;
  }
  // Sums of all of the panel's columns, kMostTileRows rows at a time.
  std::array<float, kMostTileRows * kPanelColumns> all{};
  for (std::int64_t first = 0; first < rows; first += kMostTileRows) {
    const std::int64_t count = std::min(kMostTileRows, rows - first);
    const StridedRows<float> out = sums.from(first, 0);
    for (std::int64_t r = 0; adds && r < count; ++r)
      std::copy_n(out.at(r, 0), columns, all.data() + r * kPanelColumns);
    multiply_rows({.a = a.from(first, 0),
                   .panel = panel,
                   .depth = depth,
                   .sums = {.values = all.data(), .stride = kPanelColumns},
                   .adds = adds},
                  count);
    for (std::int64_t r = 0; r < count; ++r)
      std::copy_n(all.data() + r * kPanelColumns, columns, out.at(r, 0));
  }
}

}  // namespace collegium::ops
