// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/shared_expert.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>

#include <utility>

namespace collegium::moe {

namespace {

at::Tensor all_rows(const at::Tensor& x_TD) { return at::full({1}, x_TD.size(0), at::kLong); }

// As the only one of a group of experts.
ops::ExpertWeights lone_expert(const SharedExpertWeights& weights) {
  return {.gate_up_EGD = weights.gate_up_GD.unsqueeze(0), .down_EDF = weights.down_DF.unsqueeze(0)};
}

at::Tensor wide(const at::Tensor& tensor) { return tensor.to(at::toOpMathType(tensor.scalar_type())); }

}  // namespace

void shared_expert_forward(SharedExpert kind, const SharedExpertWeights& weights, const at::Tensor& x_TD,
                           SharedExpertState& state) {
  state.output_TD =
      ops::expert_mlp(x_TD.contiguous(), {}, all_rows(x_TD), lone_expert(weights), state.experts);
  if (kind == SharedExpert::kGated)
    state.gate_TX = at::sigmoid(at::mm(wide(x_TD), wide(weights.gate_1D).t()));
  if (kind == SharedExpert::kResidualMix)
    state.gate_TX = at::softmax(at::mm(wide(x_TD), wide(weights.mix_2D).t()), 1);
}

at::Tensor join_shared_expert(SharedExpert kind, const at::Tensor& routed_TD, SharedExpertState& state) {
  if (kind == SharedExpert::kSum) return routed_TD + std::exchange(state.output_TD, {});
  if (kind == SharedExpert::kGated) {
    const at::Tensor sum_TD = wide(routed_TD) + state.gate_TX * wide(state.output_TD);
    return sum_TD.to(routed_TD.scalar_type());
  }
  state.routed_TD = routed_TD;
  const at::Tensor mixed_TD =
      state.gate_TX.narrow(1, 0, 1) * wide(routed_TD) + state.gate_TX.narrow(1, 1, 1) * wide(state.output_TD);
  return mixed_TD.to(routed_TD.scalar_type());
}

at::Tensor routed_gradient(SharedExpert kind, const SharedExpertState& state, const at::Tensor& grad_y_TD) {
  if (kind != SharedExpert::kResidualMix) return grad_y_TD;
  return (wide(grad_y_TD) * state.gate_TX.narrow(1, 0, 1)).to(grad_y_TD.scalar_type());
}

SharedExpertGradients shared_expert_backward(SharedExpert kind, const SharedExpertWeights& weights,
                                             const at::Tensor& x_TD, const SharedExpertState& state,
                                             const at::Tensor& grad_y_TD, const ops::ExpertNeeds& needs) {
  SharedExpertGradients gradients;
  at::Tensor grad_shared_TD = grad_y_TD;
  at::Tensor grad_gate_x_TD;
  const at::Tensor grad = wide(grad_y_TD);
  if (kind == SharedExpert::kGated) {
    grad_shared_TD = (grad * state.gate_TX).to(x_TD.scalar_type());
    const at::Tensor grad_logit_T1 =
        (grad * wide(state.output_TD)).sum(1, true) * state.gate_TX * (1 - state.gate_TX);
    gradients.weights.gate_1D = at::mm(grad_logit_T1.t(), wide(x_TD)).to(x_TD.scalar_type());
    grad_gate_x_TD = at::mm(grad_logit_T1, wide(weights.gate_1D));
  } else if (kind == SharedExpert::kResidualMix) {
    const at::Tensor b_T1 = state.gate_TX.narrow(1, 1, 1);
    grad_shared_TD = (grad * b_T1).to(x_TD.scalar_type());
    const at::Tensor grad_p_T2 =
        at::stack({(grad * wide(state.routed_TD)).sum(1), (grad * wide(state.output_TD)).sum(1)}, 1);
    const at::Tensor grad_logits_T2 = state.gate_TX * (grad_p_T2 - (grad_p_T2 * state.gate_TX).sum(1, true));
    gradients.weights.mix_2D = at::mm(grad_logits_T2.t(), wide(x_TD)).to(x_TD.scalar_type());
    grad_gate_x_TD = at::mm(grad_logits_T2, wide(weights.mix_2D));
  }
  ops::ExpertMlpBackward inner(state.experts, lone_expert(weights), grad_shared_TD.contiguous(), needs);
  const ops::ExpertRowGradients rows = inner.rows(ops::WeightGradients::kAfterRows);
  const ops::ExpertWeightGradients expert = inner.weights();
  if (needs.gate_up) gradients.weights.gate_up_GD = expert.gate_up_EGD.squeeze(0);
  if (needs.down) gradients.weights.down_DF = expert.down_EDF.squeeze(0);
  gradients.x_TD = rows.x_RD;
  if (needs.rows && grad_gate_x_TD.defined())
    gradients.x_TD = (wide(rows.x_RD) + grad_gate_x_TD).to(x_TD.scalar_type());
  return gradients;
}

}  // namespace collegium::moe
