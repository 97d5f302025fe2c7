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

ExpertsGradients experts_backward(const ExpertsState& state, const at::Tensor& grad_RD,
                                  const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF,
                                  const ExpertsNeeds& needs) {
  ExpertsGradients gradients;
  if (needs.down) {
    gradients.down_LDF = ops::grouped_mm_grad_weights(grad_RD, state.activation_RF, state.counts_L);
  }
  const at::Tensor grad_RF = ops::grouped_mm_grad_rows(grad_RD, down_LDF, state.counts_L);
  const ops::SwigluGradients inner = ops::swiglu_backward(grad_RF, state.gate_up_RG, state.weights_R);
  gradients.weights_R = inner.weights_R;
  if (needs.gate_up) {
    gradients.gate_up_LGD = ops::grouped_mm_grad_weights(inner.gate_up_RG, state.rows_RD, state.counts_L);
  }
  if (needs.rows)
    gradients.rows_RD = ops::grouped_mm_grad_rows(inner.gate_up_RG, gate_up_LGD, state.counts_L);
  return gradients;
}

}  // namespace collegium::moe
