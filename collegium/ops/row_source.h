// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows of experts where they lie already. Where a token goes to K experts of its own rank, its row is read K
// times from one place instead of being copied K times first: a row that a task gathers is still in the
// core's cache when its GEMM reads it, or the GEMM reads it by its index.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/strided_rows.h"

namespace collegium::ops {

/// What     Row r is values_XD[index_R[r]], or values_XD[r] without an index.
/// Shape    values_XD [X, D], with an index its rows contiguous; index_R int32 [R], contiguous, of rows that
///          there are, or undefined.
struct RowSource {
  at::Tensor values_XD;
  at::Tensor index_R;

  RowSource() = default;
  // NOLINTNEXTLINE(google-explicit-constructor): a tensor's rows are such rows
  RowSource(at::Tensor values, at::Tensor index = {})
      : values_XD(std::move(values)), index_R(std::move(index)) {}

  std::int64_t rows() const { return index_R.defined() ? index_R.numel() : values_XD.size(0); }
  std::int64_t width() const { return values_XD.size(1); }
  /// What     Some of the rows; some columns of all.
  RowSource some_rows(std::int64_t first, std::int64_t count) const;
  RowSource some_columns(std::int64_t first, std::int64_t count) const;
  /// Shape    [R, D]: gathered, or the values themselves without an index.
  at::Tensor tensor() const;
  /// What     Null without an index.
  const std::int32_t* index() const {
    if (!index_R.defined()) return nullptr;
    COLLEGIUM_CHECK(index_R.is_contiguous(), "the index of rows must be contiguous");
    return index_R.const_data_ptr<std::int32_t>();
  }
  /// What     To read where they lie, for values of type T on the CPU.
  template <typename T>
  IndexedRows<const T> in_place() const {
    return {rows_of<T>(values_XD), index()};
  }
};

/// A buffer per worker that rows are gathered into, in the dtype that products are computed in, unless these
/// read them where they lie.
class WorkerRows {
 public:
  /// What     Space for `most_rows` rows of every worker. Rows that products read by their index, and those
  ///          without one, stay where they are unless they are padded, which is said here.
  WorkerRows(RowSource source, std::int64_t most_rows, bool padded);

  /// What     The rows of a range, followed by zero rows up to `padded`. Valid until the worker's next call.
  /// Shape    [padded, D].
  RowSource rows(const ExpertRows& range, std::int64_t padded, std::int64_t worker) const;

 private:
  RowSource source_;
  bool in_place_;
  at::Tensor buffers_;  // [workers, most_rows, D]
};

}  // namespace collegium::ops
