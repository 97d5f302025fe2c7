// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows of experts where they lie already. Where a token goes to K experts of its own rank, its row is read K
// times from one place instead of being copied K times first: a row that a task gathers is still in the
// core's cache when its GEMM reads it.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "collegium/ops/expert_tasks.h"

namespace collegium::ops {

/// What     Row r is values_XD[index_R[r]], or values_XD[r] without an index.
/// Shape    values_XD [X, D], contiguous; index_R int32 [R] or undefined.
struct RowSource {
  at::Tensor values_XD;
  at::Tensor index_R;

  std::int64_t rows() const { return index_R.defined() ? index_R.numel() : values_XD.size(0); }
  std::int64_t width() const { return values_XD.size(1); }
  /// Shape    [R, D]: gathered, or the values themselves without an index.
  at::Tensor tensor() const;
};

/// A buffer per worker that rows are gathered into, in the dtype that products are computed in.
class WorkerRows {
 public:
  /// What     Space for `most_rows` rows of every worker. Without an index rows are read in place unless
  ///          they are padded, which is said here.
  WorkerRows(RowSource source, std::int64_t most_rows, bool padded);

  /// What     The rows of a range, followed by zero rows up to `padded`. Valid until the worker's next call.
  /// Shape    [padded, D].
  at::Tensor rows(const ExpertRows& range, std::int64_t padded, std::int64_t worker) const;

 private:
  RowSource source_;
  at::Tensor buffers_;  // [workers, most_rows, D]
};

}  // namespace collegium::ops
