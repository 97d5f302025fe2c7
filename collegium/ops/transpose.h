// SPDX-License-Identifier: Apache-2.0
#pragma once

// Transposed copies of rows. A weight's gradient multiplies by the transpose of rows; block products take
// rows as they lie only (ops/block_product.h), and ATen's on AMX took up to twice as long without such a
// copy.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "collegium/ops/row_source.h"
#include "collegium/ops/strided_rows.h"

namespace collegium::ops {

/// What     out[y, x] = in[x, y], on the calling thread.
/// Shape    in [X, Y], out [Y, X]; rows of both are contiguous and may lie apart. Dtype any, alike.
void transpose_into(const RowSource& in_XY, const at::Tensor& out_YX);

/// What     out[w, n] = in[n, w], words of 32 bits: fp32 values, or pairs of bf16 values that stay together.
/// Shape    in [rows, words].
void transpose_words(const StridedRows<const std::uint32_t>& in, std::int64_t rows, std::int64_t words,
                     const StridedRows<std::uint32_t>& out);

/// A buffer per worker for transposed rows, where products want them.
class WorkerTransposes {
 public:
  /// What     Values that the transpose of so many rows takes. Its own rows lie apart by one of few numbers,
  ///          for each of which block products have a kernel.
  static std::int64_t values(std::int64_t rows, std::int64_t columns);

  /// What     For transposes of at most `most_values` values of this dtype, or of a smaller one.
  WorkerTransposes(const at::TensorOptions& options, std::int64_t most_values);

  /// What     The transpose: a copy where products are faster with one, else a view. A copy is valid until
  ///          the worker's next call.
  /// Shape    rows [Z, O] -> [O, Z].
  at::Tensor of(const RowSource& rows_ZO, std::int64_t worker) const;

 private:
  at::Tensor buffers_;  // [workers, values], or undefined
};

}  // namespace collegium::ops
