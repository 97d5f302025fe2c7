// SPDX-License-Identifier: Apache-2.0
#pragma once

// The expert that every token takes, and how its output joins the routed one.

#include <ATen/core/Tensor.h>

#include "collegium/moe/options.h"
#include "collegium/ops/expert_mlp.h"

namespace collegium::moe {

struct SharedExpertWeights {
  at::Tensor gate_up_GD;  ///< [2F', D]
  at::Tensor down_DF;     ///< [D, F']
  at::Tensor gate_1D;     ///< kGated
  at::Tensor mix_2D;      ///< kResidualMix
};

struct SharedExpertState {
  ops::ExpertsKept experts;
  at::Tensor output_TD;
  at::Tensor routed_TD;  ///< kResidualMix
  at::Tensor gate_TX;    ///< sigmoid [T, 1], or softmax [T, 2] (routed, shared), in fp32 or wider
};

/// What     The shared expert's output s and its gate, into `state`; needs no routed output, so it can run
///          while rows travel.
/// Shape    x_TD [T, D].
void shared_expert_forward(SharedExpert kind, const SharedExpertWeights& weights, const at::Tensor& x_TD,
                           SharedExpertState& state);

/// What     y = routed + s (kSum); routed + sigmoid(g x) s (kGated, Qwen2-MoE); a routed + b s with (a, b) =
///          softmax(M x) (kResidualMix, [Rajbhandari2022, Sec 3.2] arXiv 2201.05596).
/// Shape    routed_TD [T, D] -> [T, D].
at::Tensor join_shared_expert(SharedExpert kind, const at::Tensor& routed_TD, SharedExpertState& state);

/// What     dLoss/d(routed) from dLoss/dy.
at::Tensor routed_gradient(SharedExpert kind, const SharedExpertState& state, const at::Tensor& grad_y_TD);

struct SharedExpertGradients {
  at::Tensor x_TD;
  SharedExpertWeights weights;
};
/// What     The other gradients for dLoss/dy; undefined where the kind has no such weight, and for the
///          input and the expert's weights where `needs` leaves them out.
SharedExpertGradients shared_expert_backward(SharedExpert kind, const SharedExpertWeights& weights,
                                             const at::Tensor& x_TD, const SharedExpertState& state,
                                             const at::Tensor& grad_y_TD, const ops::ExpertNeeds& needs);

}  // namespace collegium::moe
