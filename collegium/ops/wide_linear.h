// SPDX-License-Identifier: Apache-2.0
#pragma once

// The router's products: activations in the compute dtype, weights and logits in fp32 (fp64 for fp64). Rows
// are widened some at a time in a core's cache, so that no wide copy of the activations is made or kept.

#include <ATen/core/Tensor.h>

namespace collegium::ops {

/// What     y = x w^T.
/// Shape    x_TD [T, D] any floating dtype, w_ED [E, D] fp32 or fp64 -> [T, E] in the dtype of w.
at::Tensor wide_linear(const at::Tensor& x_TD, const at::Tensor& w_ED);

/// What     dw = g^T x, added over fixed ranges of rows in their order, whatever the number of threads.
/// Shape    grad_TE [T, E], x_TD [T, D] -> [E, D] in the dtype of grad_TE.
at::Tensor wide_linear_grad_weight(const at::Tensor& grad_TE, const at::Tensor& x_TD);

/// What     dx = g w + share, rounded once.
/// Shape    grad_TE [T, E], w_ED [E, D]; share_TD [T, D] or undefined (= 0) -> [T, D] in `dtype`.
at::Tensor wide_linear_grad_input(const at::Tensor& grad_TE, const at::Tensor& w_ED,
                                  const at::Tensor& share_TD, at::ScalarType dtype);

}  // namespace collegium::ops
