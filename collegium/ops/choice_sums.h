// SPDX-License-Identifier: Apache-2.0
#pragma once

// What balance losses and monitors count of the tokens' choices, in one pass over them.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::ops {

struct ChoiceSums {
  at::Tensor counts_BE;        ///< int64: choices of an expert
  at::Tensor first_counts_BE;  ///< int64: those that are a token's first
  at::Tensor weights_BE;       ///< dtype of the weights: sum of the weights of the choices
};

/// What     Sums over the tokens of every sequence.
/// Shape    ids_TK int32 [T, K], -1 = no choice; weights_TK [T, K]; T tokens in B sequences of equal length.
/// Dtype    weights float32 or float64, summed in float64 in the order of the tokens and rounded once.
/// Throws   InternalError: an id of no expert.
ChoiceSums sum_choices(const at::Tensor& ids_TK, const at::Tensor& weights_TK, std::int64_t num_sequences,
                       std::int64_t num_experts);

/// The same with ATen operators only, for any device; sums in the weights' dtype.
ChoiceSums sum_choices_aten(const at::Tensor& ids_TK, const at::Tensor& weights_TK,
                            std::int64_t num_sequences, std::int64_t num_experts);

}  // namespace collegium::ops
