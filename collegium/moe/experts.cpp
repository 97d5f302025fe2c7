// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/experts.h"

#include "collegium/ops/grouped_mm.h"
#include "collegium/ops/swiglu.h"

namespace collegium::moe {

at::Tensor experts_forward(const at::Tensor& rows_RD, const at::Tensor& weights_R, const at::Tensor& counts_L,
                           const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF, ExpertsState& state) {
  state.rows_RD = rows_RD;
  state.weights_R = weights_R;
  state.counts_L = counts_L;
  state.gate_up_RG = ops::grouped_mm(rows_RD, gate_up_LGD, counts_L);
  state.activation_RF = ops::swiglu(state.gate_up_RG, weights_R);
  return ops::grouped_mm(state.activation_RF, down_LDF, counts_L);
}

RowGradients ExpertsBackward::rows(const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF) {
  const at::Tensor grad_RF = ops::grouped_mm_grad_rows(grad_RD_, down_LDF, state_.counts_L);
  const ops::SwigluGradients inner = ops::swiglu_backward(grad_RF, state_.gate_up_RG, state_.weights_R);
  grad_gate_up_RG_ = inner.gate_up_RG;
  RowGradients gradients{.rows_RD = {}, .weights_R = inner.weights_R};
  if (needs_.rows)
    gradients.rows_RD = ops::grouped_mm_grad_rows(grad_gate_up_RG_, gate_up_LGD, state_.counts_L);
  return gradients;
}

ExpertWeightGradients ExpertsBackward::weights() const {
  ExpertWeightGradients gradients;
  if (needs_.down)
    gradients.down_LDF = ops::grouped_mm_grad_weights(grad_RD_, state_.activation_RF, state_.counts_L);
  if (needs_.gate_up)
    gradients.gate_up_LGD = ops::grouped_mm_grad_weights(grad_gate_up_RG_, state_.rows_RD, state_.counts_L);
  return gradients;
}

}  // namespace collegium::moe
