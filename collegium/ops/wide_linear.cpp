// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/wide_linear.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "collegium/ops/expert_tasks.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

// Rows that are widened at a time: 256 of 512 fp32 values are half of a core's second cache.
constexpr std::int64_t kRows = 256;

std::int64_t blocks_of(std::int64_t rows) { return (rows + kRows - 1) / kRows; }

// Calls work(first row, rows, worker) for every block.
template <typename Work>
void for_each_block(std::int64_t num_rows, const Work& work) {
  run_tasks(blocks_of(num_rows), [&](std::int64_t block, std::int64_t worker) {
    const std::int64_t first = block * kRows;
    work(first, std::min(kRows, num_rows - first), worker);
  });
}

at::Tensor buffers(std::int64_t width, const at::Tensor& like) {
  return at::empty({at::get_num_threads(), kRows, width}, like.options());
}

// `rows` in the buffer's dtype: themselves where they have it.
at::Tensor widened(const at::Tensor& rows, const at::Tensor& buffer) {
  if (rows.scalar_type() == buffer.scalar_type()) return rows;
  return buffer.narrow(0, 0, rows.size(0)).copy_(rows);
}

template <typename T>
COLLEGIUM_INLINE void add_rounded_rows(const row_math::Wide<T>* sum, const T* share, std::int64_t count,
                                       T* __restrict__ out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = row_math::narrow<T>(sum[i] + row_math::widen(share[i]));
}
COLLEGIUM_CLONES void add_rounded(const double* sum, const double* share, std::int64_t count, double* out) {
  add_rounded_rows(sum, share, count, out);
}
COLLEGIUM_CLONES void add_rounded(const float* sum, const float* share, std::int64_t count, float* out) {
  add_rounded_rows(sum, share, count, out);
}
COLLEGIUM_CLONES void add_rounded(const float* sum, const c10::BFloat16* share, std::int64_t count,
                                  c10::BFloat16* out) {
  add_rounded_rows(sum, share, count, out);
}

}  // namespace

at::Tensor wide_linear(const at::Tensor& x_TD, const at::Tensor& w_ED) {
  if (!x_TD.is_cpu()) return at::mm(x_TD.to(w_ED.scalar_type()), w_ED.t());
  at::Tensor y_TE = at::empty({x_TD.size(0), w_ED.size(0)}, w_ED.options());
  const at::Tensor wide = buffers(x_TD.size(1), w_ED);
  for_each_block(x_TD.size(0), [&](std::int64_t first, std::int64_t rows, std::int64_t worker) {
    at::Tensor y = y_TE.narrow(0, first, rows);
    at::mm_out(y, widened(x_TD.narrow(0, first, rows), wide.select(0, worker)), w_ED.t());
  });
  return y_TE;
}

at::Tensor wide_linear_grad_weight(const at::Tensor& grad_TE, const at::Tensor& x_TD) {
  if (!x_TD.is_cpu()) return at::mm(grad_TE.t(), x_TD.to(grad_TE.scalar_type()));
  constexpr std::int64_t kParts = 16;
  const std::int64_t num_blocks = blocks_of(x_TD.size(0));
  const std::int64_t num_parts = std::clamp(num_blocks, std::int64_t{1}, kParts);
  const at::Tensor parts = at::zeros({num_parts, grad_TE.size(1), x_TD.size(1)}, grad_TE.options());
  const at::Tensor wide = buffers(x_TD.size(1), grad_TE);
  run_tasks(num_parts, [&](std::int64_t part, std::int64_t worker) {
    at::Tensor sum_ED = parts.select(0, part);
    for (std::int64_t block = num_blocks * part / num_parts; block < num_blocks * (part + 1) / num_parts;
         ++block) {
      const std::int64_t first = block * kRows;
      const std::int64_t rows = std::min(kRows, x_TD.size(0) - first);
      sum_ED.addmm_(grad_TE.narrow(0, first, rows).t(),
                    widened(x_TD.narrow(0, first, rows), wide.select(0, worker)));
    }
  });
  return parts.sum(0);
}

at::Tensor wide_linear_grad_input(const at::Tensor& grad_TE, const at::Tensor& w_ED,
                                  const at::Tensor& share_TD, at::ScalarType dtype) {
  if (!grad_TE.is_cpu() || !share_TD.defined() || share_TD.scalar_type() != dtype) {
    const at::Tensor grad_TD = at::mm(grad_TE, w_ED);
    return (share_TD.defined() ? grad_TD + share_TD : grad_TD).to(dtype);
  }
  const std::int64_t width = w_ED.size(1);
  const at::Tensor share = share_TD.contiguous();
  at::Tensor grad_TD = at::empty(share.sizes(), share.options());
  const at::Tensor wide = buffers(width, w_ED);
  for_each_block(grad_TE.size(0), [&](std::int64_t first, std::int64_t rows, std::int64_t worker) {
    at::Tensor sum = wide.select(0, worker).narrow(0, 0, rows);
    at::mm_out(sum, grad_TE.narrow(0, first, rows), w_ED);
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, dtype, "wide_linear_grad_input", [&] {
      add_rounded(sum.const_data_ptr<row_math::Wide<scalar_t>>(),
                  share.const_data_ptr<scalar_t>() + first * width, rows * width,
                  grad_TD.mutable_data_ptr<scalar_t>() + first * width);
    });
  });
  return grad_TD;
}

}  // namespace collegium::ops
