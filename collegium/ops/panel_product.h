// SPDX-License-Identifier: Apache-2.0
#pragma once

// The product that blocks of fp32 are made of where oneDNN has no kernel or a slow one: some rows times a
// panel, a few columns whose values of one row lie side by side, so that the first cache holds it and a
// core's registers the sums. On a core with AVX2 it gets 88 to 92 of 93 GFLOP/s.

#include <cstdint>

#include "collegium/ops/strided_rows.h"

namespace collegium::ops {

/// Columns of a panel: one cache line of every row.
inline constexpr std::int64_t kPanelColumns = kLineBytes / static_cast<std::int64_t>(sizeof(float));

/// What     sums[r, n] = sum over k of a[r, k] panel[k, n], or where `adds` that much more, added in the
///          order of k whatever the number of rows is.
/// Shape    a [rows, depth], panel [depth, kPanelColumns] contiguous, sums [rows, columns], columns at most
///          kPanelColumns: the others of the panel are not used.
void panel_product(const IndexedRows<const float>& a, std::int64_t rows, const float* panel,
                   std::int64_t depth, const StridedRows<float>& sums, std::int64_t columns, bool adds);

}  // namespace collegium::ops
