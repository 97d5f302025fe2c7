// SPDX-License-Identifier: Apache-2.0
#pragma once

// The router: scores, selection and weights, forward and backward. Everything here runs in fp32, or in
// float64 when the model is float64.

#include <ATen/core/Tensor.h>

#include <memory>

#include "collegium/moe/options.h"
#include "collegium/moe/routing.h"

namespace collegium::moe {

/// Weights that the router reads, in the model's compute dtype; undefined where the options do not need them.
struct RouterWeights {
  at::Tensor gate_ED;        ///< [E, D]
  at::Tensor noise_ED;       ///< [E, D], noisy top-K only
  at::Tensor expert_bias_E;  ///< router dtype, loss-free balancing only; never receives a gradient
};

/// What the backward pass needs; opaque outside moe/router*.cpp.
struct RouterState;

struct RouterOutput {
  Routing routing;
  RouterStatistics statistics;
  at::Tensor expert_input_TD;  ///< what the experts see: x, or the jittered x with Noise::kJitterInput
  std::shared_ptr<RouterState> state;
};

struct RouterGradients {
  at::Tensor x_TD;      ///< [T, D] compute dtype, with the experts' share, rounded once
  at::Tensor gate_ED;   ///< router dtype
  at::Tensor noise_ED;  ///< router dtype, or undefined
};

/// What     logits_TE = x W^T (+ noise); K experts per token; their weights; the statistics of balance
///          losses.
/// Shape    x_TD [T, D] in the compute dtype; T may be 0.
/// Order    Ties go to the lower expert id; deterministic.
/// Throws   ConfigError where tokens are dropped and a capacity group straddles two ranks (kept_slots()).
///          `replayed_ids_TK` (int32, optional) replaces the selection.
RouterOutput route(const MoeOptions& options, const RouterWeights& weights, const at::Tensor& x_TD,
                   const TokenContext& context, const at::Tensor& replayed_ids_TK = {});

/// What     Gradients of sum(grad_weights * weights) + the balance losses whose dLoss/dStatistics is
///          given, and of what the experts saw: grad_expert_input_TD, or undefined.
/// Shape    grad_weights_TK [T, K] router dtype; grad_expert_input_TD [T, D].
RouterGradients route_backward(const RouterState& state, const at::Tensor& grad_weights_TK,
                               const RouterStatisticsGradient& grad_statistics,
                               const at::Tensor& grad_expert_input_TD);

}  // namespace collegium::moe
