// SPDX-License-Identifier: Apache-2.0
#pragma once

// SwiGLU with the router's weight inside: applying the weight between the two GEMMs means that expert outputs
// need not be kept for the backward pass, and the weight's gradient is a dot product over the activation.

#include <ATen/core/Tensor.h>

namespace collegium::ops {

/// What     a[r, f] = w[r] silu(gate[r, f]) up[r, f], where gate = h[:, :F], up = h[:, F:] and
///          silu(z) = z / (1 + exp(-z)).
/// Shape    gate_up_RG [R, 2F], weights_R [R] or undefined (= 1) -> [R, F].
/// Dtype    any floating dtype; inner math fp32 (fp64 for fp64), rounded once. Weights fp32 or fp64.
/// Ref      [Shazeer2020, Eq 6] arXiv 2002.05202
at::Tensor swiglu(const at::Tensor& gate_up_RG, const at::Tensor& weights_R);
at::Tensor swiglu_aten(const at::Tensor& gate_up_RG, const at::Tensor& weights_R);
/// The same on the CPU, into a contiguous `out_RF`; the weights have the type of the inner math.
void swiglu_into(const at::Tensor& gate_up_RG, const at::Tensor& weights_R, const at::Tensor& out_RF);

/// What     A router's weights in the type of the inner math for rows of `dtype`; undefined stays undefined.
at::Tensor inner_weights(const at::Tensor& weights_R, at::ScalarType dtype);

struct SwigluGradients {
  at::Tensor gate_up_RG;  ///< dtype of gate_up
  at::Tensor weights_R;   ///< dtype of the weights; undefined when they are
};

/// What     Gradients of swiglu() for grad_RF = dLoss/da: with s = sigmoid(gate), dgate = w g up s (1 + gate
///          (1 - s)), dup = w g silu(gate), dw = sum_f g silu(gate) up.
SwigluGradients swiglu_backward(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                                const at::Tensor& weights_R);
SwigluGradients swiglu_backward_aten(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                                     const at::Tensor& weights_R);
/// The same on the CPU, into contiguous tensors, and the activation a once more, bit for bit as swiglu()
/// gives it, so that it need not be kept: its parts are at hand here. Weights and their gradient have the
/// type of the inner math; both are undefined or neither. `activation_RF` may be undefined.
void swiglu_backward_into(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                          const at::Tensor& weights_R, const SwigluGradients& out,
                          const at::Tensor& activation_RF);

}  // namespace collegium::ops
