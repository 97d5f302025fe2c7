// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/softmax_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/xlogy.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

// Rows per task: a row of 64 columns costs some 50 ns.
constexpr std::int64_t kSoftmaxRowsPerTask = 128;

// 0 times it is 0, where 0 times infinity is not. (A choice by the probability is compiled wrongly by
// GCC 12.)
template <typename T>
constexpr T kFinite = std::numeric_limits<T>::max();

template <typename T>
struct ForwardRows {
  const T* logits;
  std::int64_t num_rows;
  std::int64_t num_columns;
  T* probs;
  T* lse;
  T* entropy;
};

template <typename T>
COLLEGIUM_INLINE void forward_rows(const ForwardRows<T>& o) {
  for (std::int64_t row = 0; row < o.num_rows; ++row) {
    const T* logits = o.logits + row * o.num_columns;
    T* __restrict__ probs = o.probs + row * o.num_columns;
    const T most = row_math::lane_max(logits, o.num_columns);
    for (std::int64_t e = 0; e < o.num_columns; ++e) probs[e] = row_math::exp_of_negative(logits[e] - most);
    const T sum = row_math::lane_sum<T>(o.num_columns, [probs](std::int64_t e) { return probs[e]; });
    const T log_sum = std::log(sum);
    const T inverse = T{1} / sum;
    for (std::int64_t e = 0; e < o.num_columns; ++e) probs[e] *= inverse;
    const T below = row_math::lane_sum<T>(o.num_columns, [probs, logits, most](std::int64_t e) {
      return probs[e] * std::min(most - logits[e], kFinite<T>);
    });
    o.lse[row] = most + log_sum;
    o.entropy[row] = log_sum + below;
  }
}

template <typename T>
struct BackwardRows {
  const T* probs;
  std::int64_t first_row;
  std::int64_t num_rows;
  std::int64_t num_columns;
  const T* sequences;  // or null
  std::int64_t length;
  const T* valid;  // or null
  const std::int64_t* slot_ids;
  const T* slots;  // or null
  std::int64_t num_slots;
  const T* lse;  // or null
  T* scratch;    // a row
  T* grad;
};

template <typename T>
COLLEGIUM_INLINE void backward_rows(const BackwardRows<T>& o) {
  T* __restrict__ sum = o.scratch;
  for (std::int64_t row = o.first_row; row < o.first_row + o.num_rows; ++row) {
    const T* probs = o.probs + row * o.num_columns;
    T* __restrict__ grad = o.grad + row * o.num_columns;
    if (o.sequences != nullptr) {
      const T* sequence = o.sequences + row / o.length * o.num_columns;
      const T valid = o.valid != nullptr ? o.valid[row] : T{1};
      for (std::int64_t e = 0; e < o.num_columns; ++e) sum[e] = sequence[e] * valid;
    } else {
      for (std::int64_t e = 0; e < o.num_columns; ++e) sum[e] = T{0};
    }
    if (o.slots != nullptr) {
      for (std::int64_t slot = row * o.num_slots; slot < (row + 1) * o.num_slots; ++slot)
        sum[o.slot_ids[slot]] += o.slots[slot];
    }
    const T mean =
        row_math::lane_sum<T>(o.num_columns, [sum, probs](std::int64_t e) { return sum[e] * probs[e]; });
    const T lse = o.lse != nullptr ? o.lse[row] : T{0};
    for (std::int64_t e = 0; e < o.num_columns; ++e) grad[e] = probs[e] * (sum[e] - mean + lse);
  }
}

COLLEGIUM_CLONES void forward(const ForwardRows<double>& o) { forward_rows(o); }
COLLEGIUM_CLONES void forward(const ForwardRows<float>& o) { forward_rows(o); }
COLLEGIUM_CLONES void backward(const BackwardRows<double>& o) { backward_rows(o); }
COLLEGIUM_CLONES void backward(const BackwardRows<float>& o) { backward_rows(o); }

// The rows of an optional tensor in the dtype of the probabilities.
struct Rows {
  at::Tensor tensor;
  template <typename T>
  const T* data() const {
    return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
  }
};
Rows rows_of(const at::Tensor& tensor, at::ScalarType dtype) {
  return {tensor.defined() ? tensor.to(dtype).contiguous() : tensor};
}

std::int64_t sequence_length(const at::Tensor& probs_TE, const SoftmaxRowsGradient& grad) {
  const std::int64_t num_sequences = grad.sequence_BE.defined() ? grad.sequence_BE.size(0) : 1;
  COLLEGIUM_CHECK(num_sequences == 0 ? probs_TE.size(0) == 0 : probs_TE.size(0) % num_sequences == 0,
                  "{} tokens in {} sequences", probs_TE.size(0), num_sequences);
  return num_sequences == 0 ? 0 : probs_TE.size(0) / num_sequences;
}

}  // namespace

SoftmaxRows softmax_rows(const at::Tensor& logits_TE) {
  if (!logits_TE.is_cpu()) return softmax_rows_aten(logits_TE);
  const at::Tensor logits = logits_TE.contiguous();
  const std::int64_t num_columns = logits.size(1);
  SoftmaxRows rows{.probs_TE = at::empty_like(logits),
                   .lse_T1 = at::empty({logits.size(0), 1}, logits.options()),
                   .entropy_T1 = at::empty({logits.size(0), 1}, logits.options())};
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "softmax_rows", [&] {
    const ForwardRows<scalar_t> all{.logits = logits.const_data_ptr<scalar_t>(),
                                    .num_rows = logits.size(0),
                                    .num_columns = num_columns,
                                    .probs = rows.probs_TE.mutable_data_ptr<scalar_t>(),
                                    .lse = rows.lse_T1.mutable_data_ptr<scalar_t>(),
                                    .entropy = rows.entropy_T1.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, all.num_rows, kSoftmaxRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      forward(ForwardRows<scalar_t>{.logits = all.logits + begin * num_columns,
                                    .num_rows = end - begin,
                                    .num_columns = num_columns,
                                    .probs = all.probs + begin * num_columns,
                                    .lse = all.lse + begin,
                                    .entropy = all.entropy + begin});
    });
  });
  return rows;
}

SoftmaxRows softmax_rows_aten(const at::Tensor& logits_TE) {
  const at::Tensor probs_TE = at::softmax(logits_TE, 1);
  return {.probs_TE = probs_TE,
          .lse_T1 = at::logsumexp(logits_TE, {1}, true),
          .entropy_T1 = -at::xlogy(probs_TE, probs_TE).sum(1, true)};
}

at::Tensor softmax_rows_backward(const at::Tensor& probs_TE, const SoftmaxRowsGradient& grad) {
  if (!probs_TE.is_cpu()) return softmax_rows_backward_aten(probs_TE, grad);
  const at::Tensor probs = probs_TE.contiguous();
  const auto dtype = probs.scalar_type();
  const std::int64_t num_columns = probs.size(1);
  const Rows sequences = rows_of(grad.sequence_BE, dtype);
  const Rows valid = rows_of(grad.valid_T1, dtype);
  const Rows slots = rows_of(grad.slots_TK, dtype);
  const Rows slot_ids = rows_of(grad.slot_ids_TK, at::kLong);
  const Rows lse = rows_of(grad.lse_T1, dtype);
  const std::int64_t length = sequence_length(probs, grad);
  at::Tensor grad_TE = at::empty_like(probs);
  AT_DISPATCH_FLOATING_TYPES(dtype, "softmax_rows_backward", [&] {
    at::parallel_for(0, probs.size(0), kSoftmaxRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      std::vector<scalar_t> scratch(static_cast<std::size_t>(num_columns));
      backward(BackwardRows<scalar_t>{.probs = probs.const_data_ptr<scalar_t>(),
                                      .first_row = begin,
                                      .num_rows = end - begin,
                                      .num_columns = num_columns,
                                      .sequences = sequences.data<scalar_t>(),
                                      .length = length,
                                      .valid = valid.data<scalar_t>(),
                                      .slot_ids = slot_ids.data<std::int64_t>(),
                                      .slots = slots.data<scalar_t>(),
                                      .num_slots = slots.tensor.defined() ? slots.tensor.size(1) : 0,
                                      .lse = lse.data<scalar_t>(),
                                      .scratch = scratch.data(),
                                      .grad = grad_TE.mutable_data_ptr<scalar_t>()});
    });
  });
  return grad_TE;
}

at::Tensor softmax_rows_backward_aten(const at::Tensor& probs_TE, const SoftmaxRowsGradient& grad) {
  at::Tensor sum_TE = at::zeros_like(probs_TE);
  if (grad.sequence_BE.defined()) {
    const at::Tensor sequence_BE = grad.sequence_BE.to(probs_TE.scalar_type());
    const at::Tensor rows_TE = sequence_BE.repeat_interleave(sequence_length(probs_TE, grad), 0);
    sum_TE = grad.valid_T1.defined() ? rows_TE * grad.valid_T1 : rows_TE;
  }
  if (grad.slots_TK.defined()) sum_TE = sum_TE.scatter_add(1, grad.slot_ids_TK, grad.slots_TK);
  at::Tensor factor_TE = sum_TE - (sum_TE * probs_TE).sum(1, true);
  if (grad.lse_T1.defined()) factor_TE = factor_TE + grad.lse_T1;
  return probs_TE * factor_TE;
}

}  // namespace collegium::ops
