// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace collegium::model {

inline constexpr std::int64_t kNoTarget = -100;

/// Tokens whose logits exist at one time: 1024 x 8192 in bf16 are 16 MiB, about the size of a shared cache.
inline constexpr std::int64_t kLossChunkTokens = 1024;

/// What     Cross-entropy of rows of logits; with `gradient`, the logits are overwritten by softmax -
///          one_hot(target).
/// Math     loss_t = log sum_v exp(logits[t, v]) - logits[t, target_t]; 0 (and a gradient of 0) where
///          target_t = kNoTarget.
/// Shape    logits_TV [T, V], targets_T int64 -> [T].
/// Dtype    any compute dtype; softmax in fp32 (fp64 for fp64), the losses are float64.
/// Order    Deterministic.
at::Tensor softmax_loss(at::Tensor& logits_TV, const at::Tensor& targets_T, bool gradient);

/// The same as a chain of ATen operations: the oracle, and what devices other than the CPU run.
at::Tensor softmax_loss_aten(at::Tensor& logits_TV, const at::Tensor& targets_T, bool gradient);

}  // namespace collegium::model
