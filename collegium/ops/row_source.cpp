// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/row_source.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/ops/permute.h"

namespace collegium::ops {

at::Tensor RowSource::tensor() const {
  return index_R.defined() ? gather_rows(values_XD, index_R) : values_XD;
}

WorkerRows::WorkerRows(RowSource source, std::int64_t most_rows, bool padded) : source_(std::move(source)) {
  COLLEGIUM_CHECK(source_.values_XD.is_contiguous(), "rows must be contiguous");
  if (!source_.index_R.defined() && !padded) return;
  buffers_ = at::empty({at::get_num_threads(), most_rows, source_.width()}, source_.values_XD.options());
}

at::Tensor WorkerRows::rows(const ExpertRows& range, std::int64_t padded, std::int64_t worker) const {
  const bool indexed = source_.index_R.defined();
  if (!indexed && padded == range.rows) return range.of(source_.values_XD);
  at::Tensor out = buffers_.select(0, worker).narrow(0, 0, padded);
  const auto row_bytes =
      static_cast<std::size_t>(source_.width()) * static_cast<std::size_t>(out.element_size());
  const auto bytes_of = [row_bytes](std::int64_t rows) { return static_cast<std::size_t>(rows) * row_bytes; };
  const auto* source = static_cast<const char*>(source_.values_XD.const_data_ptr());
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  if (indexed) {
    const auto* index = source_.index_R.const_data_ptr<std::int32_t>() + range.begin;
    for (std::int64_t row = 0; row < range.rows; ++row)
      std::memcpy(target + bytes_of(row), source + bytes_of(index[row]), row_bytes);
  } else {
    std::memcpy(target, source + bytes_of(range.begin), bytes_of(range.rows));
  }
  std::memset(target + bytes_of(range.rows), 0, bytes_of(padded - range.rows));
  return out;
}

}  // namespace collegium::ops
