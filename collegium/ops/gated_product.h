// SPDX-License-Identifier: Apache-2.0
#pragma once

// The product beside SwiGLU in one: block by block (ops/block_product.h) the product's sums are used while
// they are in the core's first cache, so that a pass through memory is saved. Where products are whole one
// comes after the other. Results are the same, bit for bit.

#include <ATen/core/Tensor.h>

#include "collegium/ops/row_source.h"
#include "collegium/ops/swiglu.h"

namespace collegium::ops {

/// What     h = x W^T, written to gate_up_RG, and a = swiglu(h, weights): what a task of one thread does with
///          some rows of an expert.
/// Shape    x [R, D], gate_up_GD or its copy in the dtype of products [2F, D], weights_R [R] or undefined in
///          the type of SwiGLU's inner math, gate_up_RG [R, 2F], activation_RF [R, F]; both contiguous.
void gated_product_into(const RowSource& x_RD, const at::Tensor& gate_up_GD, const at::Tensor& weights_R,
                        const at::Tensor& gate_up_RG, const at::Tensor& activation_RF);

/// What     The gradients of swiglu() for dLoss/da = dy W with the weights W of the down projection, and the
///          activation again; see swiglu_backward_into().
/// Shape    grad_RD [R, D], down_DF [D, F], inner_RF [R, F], scratch for dLoss/da.
void gated_product_backward_into(const RowSource& grad_RD, const at::Tensor& down_DF,
                                 const at::Tensor& gate_up_RG, const at::Tensor& weights_R,
                                 const SwigluGradients& out, const at::Tensor& activation_RF,
                                 const at::Tensor& inner_RF);

}  // namespace collegium::ops
