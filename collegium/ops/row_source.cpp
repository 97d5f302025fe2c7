// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/row_source.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "collegium/base/error.h"
#include "collegium/ops/permute.h"
#include "collegium/ops/product.h"

namespace collegium::ops {

RowSource RowSource::some_rows(std::int64_t first, std::int64_t count) const {
  if (!index_R.defined()) return values_XD.narrow(0, first, count);
  return {values_XD, index_R.narrow(0, first, count)};
}

RowSource RowSource::some_columns(std::int64_t first, std::int64_t count) const {
  return {values_XD.narrow(1, first, count), index_R};
}

at::Tensor RowSource::tensor() const {
  return index_R.defined() ? gather_rows(values_XD, index_R) : values_XD;
}

namespace {

void check_index(const RowSource& source) {
  const auto* index = source.index();
  std::int32_t least = 0;
  std::int32_t most = -1;
  for (std::int64_t i = 0; i < source.rows(); ++i) {
    least = std::min(least, index[i]);
    most = std::max(most, index[i]);
  }
  COLLEGIUM_CHECK(least >= 0 && most < source.values_XD.size(0), "rows {} to {} of {}", least, most,
                  source.values_XD.size(0));
}

}  // namespace

WorkerRows::WorkerRows(RowSource source, std::int64_t most_rows, bool padded)
    : source_(std::move(source)),
      in_place_(!source_.index_R.defined() || products_take_index(source_.values_XD)) {
  COLLEGIUM_CHECK(source_.values_XD.is_contiguous(), "rows must be contiguous");
  if (source_.index_R.defined() && source_.values_XD.is_cpu()) check_index(source_);
  if (in_place_ && !padded) return;
  buffers_ = at::empty({at::get_num_threads(), most_rows, source_.width()},
                       source_.values_XD.options().dtype(product_dtype(source_.values_XD)));
}

RowSource WorkerRows::rows(const ExpertRows& range, std::int64_t padded, std::int64_t worker) const {
  if (in_place_ && padded == range.rows) return source_.some_rows(range.begin, range.rows);
  at::Tensor out = buffers_.select(0, worker).narrow(0, 0, padded);
  const at::Tensor copy = out.narrow(0, 0, range.rows);
  if (source_.index_R.defined()) {
    gather_rows_into(source_.values_XD, range.of(source_.index_R), copy);
  } else {
    copy.copy_(range.of(source_.values_XD));
  }
  out.narrow(0, range.rows, padded - range.rows).zero_();
  return out;
}

}  // namespace collegium::ops
