// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/experts.h"

namespace collegium::moe {

at::Tensor experts_forward(const at::Tensor& rows_RD, const at::Tensor& weights_R, const at::Tensor& counts_L,
                           const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF, ExpertsState& state) {
  state.rows_RD = rows_RD;
  state.weights_R = weights_R;
  state.counts_L = counts_L;
  return ops::expert_mlp(rows_RD, weights_R, counts_L, {.gate_up_EGD = gate_up_LGD, .down_EDF = down_LDF},
                         state.gate_up_RG);
}

RowGradients ExpertsBackward::rows(const at::Tensor& gate_up_LGD, const at::Tensor& down_LDF) {
  inner_ = ops::expert_mlp_grad_rows(grad_RD_, state_.gate_up_RG, state_.weights_R, state_.counts_L,
                                     {.gate_up_EGD = gate_up_LGD, .down_EDF = down_LDF},
                                     {.x = needs_.rows, .activation = needs_.down});
  return {.rows_RD = std::move(inner_.x_RD), .weights_R = std::move(inner_.weights_R)};
}

ExpertWeightGradients ExpertsBackward::weights() const {
  ExpertWeightGradients gradients;
  if (needs_.down) gradients.down_LDF = ops::grouped_outer(grad_RD_, inner_.activation_RF, state_.counts_L);
  if (needs_.gate_up)
    gradients.gate_up_LGD = ops::grouped_outer(inner_.gate_up_RG, state_.rows_RD, state_.counts_L);
  return gradients;
}

}  // namespace collegium::moe
