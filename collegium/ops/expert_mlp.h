// SPDX-License-Identifier: Apache-2.0
#pragma once

// The experts as two grouped GEMMs around a SwiGLU that carries the router's weight. On the CPU a task takes
// some rows through all of it, so that what lies between the GEMMs is still in the core's cache. Rows are
// grouped by expert: those of expert e are [offset_e, offset_e + counts_e). G = 2F: gate and up side by side.

#include <ATen/core/Tensor.h>

namespace collegium::ops {

struct ExpertWeights {
  at::Tensor gate_up_EGD;  ///< [E, 2F, D]
  at::Tensor down_EDF;     ///< [E, D, F]
};

/// What     y[r] = down_e (w_r silu(gate_e x_r) * up_e x_r) for the expert e of row r.
/// Shape    x_RD [R, D], weights_R [R] or undefined (= 1), counts_E int64 on the CPU, sum = R -> y_RD [R, D];
///          gate_up_RG [R, 2F] receives what the backward pass needs. The activation is not kept.
/// Dtype    of x_RD and the experts' weights alike; products summed in fp32 (fp64 for fp64).
at::Tensor expert_mlp(const at::Tensor& x_RD, const at::Tensor& weights_R, const at::Tensor& counts_E,
                      const ExpertWeights& experts, at::Tensor& gate_up_RG);
at::Tensor expert_mlp_aten(const at::Tensor& x_RD, const at::Tensor& weights_R, const at::Tensor& counts_E,
                           const ExpertWeights& experts, at::Tensor& gate_up_RG);

/// What the gradients of the rows leave behind for those of the weights.
struct ExpertRowGradients {
  at::Tensor x_RD;       ///< undefined when not needed
  at::Tensor weights_R;  ///< undefined when the forward pass had none
  at::Tensor gate_up_RG;
  at::Tensor activation_RF;  ///< recomputed; undefined when not needed
};
struct ExpertRowNeeds {
  bool x = true;
  bool activation = true;
};

/// What     Gradients of expert_mlp() for dLoss/dy = grad_RD with respect to the rows and their weights.
ExpertRowGradients expert_mlp_grad_rows(const at::Tensor& grad_RD, const at::Tensor& gate_up_RG,
                                        const at::Tensor& weights_R, const at::Tensor& counts_E,
                                        const ExpertWeights& experts, ExpertRowNeeds needs);
ExpertRowGradients expert_mlp_grad_rows_aten(const at::Tensor& grad_RD, const at::Tensor& gate_up_RG,
                                             const at::Tensor& weights_R, const at::Tensor& counts_E,
                                             const ExpertWeights& experts, ExpertRowNeeds needs);

/// What     dW_e = sum over e's rows of dy[r] x[r]^T; exactly zero for an expert without rows.
/// Shape    grad_RO [R, O], x_RI [R, I] -> [E, O, I].
at::Tensor grouped_outer(const at::Tensor& grad_RO, const at::Tensor& x_RI, const at::Tensor& counts_E);
at::Tensor grouped_outer_aten(const at::Tensor& grad_RO, const at::Tensor& x_RI, const at::Tensor& counts_E);

}  // namespace collegium::ops
