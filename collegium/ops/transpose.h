// SPDX-License-Identifier: Apache-2.0
#pragma once

// Transposed copies of rows. A weight's gradient multiplies by the transpose of rows; AMX products take
// rows as they lie only: ATen's with such a first operand took up to twice as long as with a transposed copy.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::ops {

/// What     out[y, x] = in[x, y], on the calling thread.
/// Shape    in [X, Y], out [Y, X]; rows of both are contiguous and may lie apart. Dtype any, alike.
void transpose_into(const at::Tensor& in_XY, const at::Tensor& out_YX);

/// What     Pairs of 16-bit values next to each other in a row stay together: pair p of row n becomes
///          out[p out_stride + n]. That is how AMX reads the transpose of these rows.
/// Shape    rows of `depth` values, `stride` apart; both even.
void transpose_pairs(const std::uint16_t* in, std::int64_t stride, std::int64_t rows, std::int64_t depth,
                     std::uint32_t* out, std::int64_t out_stride);

/// A buffer per worker for transposed rows, where products want them.
class WorkerTransposes {
 public:
  /// What     For rows of at most `most_values` values of this kind.
  WorkerTransposes(const at::Tensor& like, std::int64_t most_values);

  /// What     The transpose: a copy where products are faster with one, else a view. A copy is valid until
  ///          the worker's next call.
  /// Shape    rows [Z, O] -> [O, Z].
  at::Tensor of(const at::Tensor& rows_ZO, std::int64_t worker) const;

 private:
  at::Tensor buffers_;  // [workers, values], or undefined
};

}  // namespace collegium::ops
