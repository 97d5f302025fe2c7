// SPDX-License-Identifier: Apache-2.0
#pragma once

// What route() keeps for route_backward(). Private to the router.

#include <ATen/core/Tensor.h>

#include "collegium/moe/noisy_logits.h"
#include "collegium/moe/options.h"
#include "collegium/moe/router.h"

namespace collegium::moe {

struct RouterState {
  MoeOptions options;
  std::int64_t num_sequences = 1;

  at::Tensor x_TD;  ///< compute dtype; router dtype and jittered where the options say so
  at::ScalarType compute_dtype = at::kFloat;
  at::Tensor jitter_TD;  ///< factor on x for the router, or undefined
  bool input_jitter = false;
  at::Tensor gate_ED;   ///< router dtype
  at::Tensor noise_ED;  ///< router dtype, or undefined
  at::Tensor clean_TE;  ///< logits before noise; dropped after the forward pass where they are the softmax's
  NoisyLogits noisy;    ///< learned noise, in training
  SmoothLoad load;

  at::Tensor scores_TE;          ///< softmax or sigmoid of the (noisy) logits
  at::Tensor score_sum_T1;       ///< sigmoid only: what normalises the statistics' probabilities; not 0
  at::Tensor lse_T1;             ///< logsumexp of the clean logits
  at::Tensor entropy_T1;         ///< softmax only: of the scores, in nats
  at::Tensor valid_T1;           ///< 1 = a token, 0 = padding; undefined = all tokens
  at::Tensor slot_ids_TK;        ///< int64, the choices before any drop, 0 where there is none
  at::Tensor chosen_TK;          ///< router dtype 0/1: there is a choice
  at::Tensor kept_TK;            ///< router dtype 0/1: it was not dropped
  std::int64_t num_dropped = 0;  ///< by the capacity
  at::Tensor raw_TK;             ///< weights before renormalisation
  at::Tensor normalized_TK;      ///< weights after renormalisation and dropping, before the scaling factor
  at::Tensor divisor_T1;         ///< what raw was divided by, or undefined
};

/// One forward pass of the weights: raw -> normalised -> dropped -> scaled; its gradient is
/// weights_backward().
void finish_weights(RouterState& state, RouterOutput& output, const TokenContext& context);
at::Tensor weights_backward(const RouterState& state, const at::Tensor& grad_weights_TK,
                            const at::Tensor& grad_importance_TK);

/// The sums over tokens that losses and monitors are computed from; choices before any drop.
RouterStatistics collect_statistics(const RouterState& state, const at::Tensor& chosen_ids_TK,
                                    const TokenContext& context);

}  // namespace collegium::moe
