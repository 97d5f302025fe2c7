// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/row_source.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "collegium/base/error.h"
#include "collegium/ops/permute.h"
#include "collegium/ops/product.h"

namespace collegium::ops {

at::Tensor RowSource::tensor() const {
  return index_R.defined() ? gather_rows(values_XD, index_R) : values_XD;
}

WorkerRows::WorkerRows(RowSource source, std::int64_t most_rows, bool padded) : source_(std::move(source)) {
  COLLEGIUM_CHECK(source_.values_XD.is_contiguous(), "rows must be contiguous");
  if (!source_.index_R.defined() && !padded) return;
  buffers_ = at::empty({at::get_num_threads(), most_rows, source_.width()},
                       source_.values_XD.options().dtype(product_dtype(source_.values_XD)));
}

at::Tensor WorkerRows::rows(const ExpertRows& range, std::int64_t padded, std::int64_t worker) const {
  const bool indexed = source_.index_R.defined();
  if (!indexed && padded == range.rows) return range.of(source_.values_XD);
  at::Tensor out = buffers_.select(0, worker).narrow(0, 0, padded);
  const at::Tensor copy = out.narrow(0, 0, range.rows);
  if (indexed) {
    gather_rows_into(source_.values_XD, range.of(source_.index_R), copy);
  } else {
    copy.copy_(range.of(source_.values_XD));
  }
  out.narrow(0, range.rows, padded - range.rows).zero_();
  return out;
}

}  // namespace collegium::ops
