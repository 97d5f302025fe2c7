// SPDX-License-Identifier: Apache-2.0
#pragma once

// A router's probabilities and what losses and monitors want of the same logits, in one pass over each row.

#include <ATen/core/Tensor.h>

namespace collegium::ops {

struct SoftmaxRows {
  at::Tensor probs_TE;
  at::Tensor lse_T1;      ///< log sum_e exp(logit_e)
  at::Tensor entropy_T1;  ///< -sum_e p_e log p_e, in nats, where 0 log 0 = 0
};

/// What     Softmax of every row, with its logsumexp and its entropy.
/// Math     p_e = exp(z_e - m) / s, s = sum_e exp(z_e - m), m = max z; lse = m + log s;
///          entropy = log s + sum_e p_e (m - z_e).
/// Dtype    float32 or float64; a row that holds NaN or +infinity becomes NaN. The same for any threads.
SoftmaxRows softmax_rows(const at::Tensor& logits_TE);

/// The same with ATen operators only, for any device.
SoftmaxRows softmax_rows_aten(const at::Tensor& logits_TE);

/// dLoss/d of what comes from softmax_rows; what is undefined has none.
struct SoftmaxRowsGradient {
  at::Tensor sequence_BE;  ///< of every probability of the tokens of sequence b
  at::Tensor valid_T1;     ///< factor on a token's share of sequence_BE: 0 = padding; undefined = 1
  at::Tensor slot_ids_TK;  ///< int64 columns, needed with slots_TK
  at::Tensor slots_TK;     ///< of the probabilities in these columns; repeated columns add up
  at::Tensor lse_T1;       ///< of the logsumexp
};

/// What     dLoss/dlogits.
/// Math     g_e = sequence_e valid + sum_{k: id_k = e} slot_k; dz_e = p_e (g_e + lse - sum_i g_i p_i).
/// Shape    probs_TE [T, E], T tokens in B sequences of equal length; all in the dtype of the
///          probabilities.
at::Tensor softmax_rows_backward(const at::Tensor& probs_TE, const SoftmaxRowsGradient& grad);

/// The same with ATen operators only, for any device.
at::Tensor softmax_rows_backward_aten(const at::Tensor& probs_TE, const SoftmaxRowsGradient& grad);

}  // namespace collegium::ops
