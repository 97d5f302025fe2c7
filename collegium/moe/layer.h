// SPDX-License-Identifier: Apache-2.0
#pragma once

// The MoE layer as one autograd function with an explicit forward and backward (docs/architecture.md, "The
// data path").

#include <ATen/core/Tensor.h>

#include <memory>

#include "collegium/moe/dispatcher.h"
#include "collegium/moe/options.h"
#include "collegium/moe/router.h"
#include "collegium/moe/routing.h"
#include "collegium/moe/stage_times.h"

namespace collegium::moe {

/// All weights of one layer, in the compute dtype (the bias in the router's). Undefined where the options
/// need none.
struct MoeWeights {
  RouterWeights router;
  at::Tensor gate_up_LGD;  ///< [L, 2F, D], this rank's experts: rows 0..F-1 gate, F..2F-1 up
  at::Tensor down_LDF;     ///< [L, D, F]
  at::Tensor shared_gate_up_GD;
  at::Tensor shared_down_DF;
  at::Tensor shared_gate_1D;  ///< SharedExpert::kGated
  at::Tensor
      shared_mix_2D;  ///< SharedExpert::kResidualMix: softmax of two logits per token mixes routed and shared
};

/// One forward pass of one layer, shared by the caller, the forward and the backward pass.
struct LayerRun {
  TokenContext context;
  at::Tensor replayed_ids_TK;                    ///< in: routing to replay, or undefined
  Routing routing;                               ///< out
  RouterStatistics statistics;                   ///< out
  RouterStatisticsGradient statistics_gradient;  ///< in, before backward(): from balance_loss()
  StageTimes* stage_times = nullptr;             ///< in: both passes add to it, or null
};

/// What     y = sum_k w_k expert_{e_k}(x) (+ shared expert); the caller adds the residual.
/// Shape    x_TD [T, D], T = 0 allowed -> y_TD [T, D].
/// Dtype    compute dtype in and out; router fp32 (float64 for float64).
/// Comm     the dispatcher's: plan, dispatch and combine, and in backward() combine and dispatch backward.
/// Order    Deterministic. With autograd on, backward() reads run->statistics_gradient at that time; under
///          activation recomputation pass the same run again: the recomputed forward leaves its outputs as
///          they are.
at::Tensor moe_layer(const MoeOptions& options, const MoeWeights& weights, const ExpertTransport& transport,
                     const at::Tensor& x_TD, const std::shared_ptr<LayerRun>& run);

}  // namespace collegium::moe
