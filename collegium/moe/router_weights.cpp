// SPDX-License-Identifier: Apache-2.0

// From the scores of the selected experts to the weights that travel with the rows.

#include <ATen/core/Tensor.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>

#include "collegium/moe/capacity.h"
#include "collegium/moe/noise.h"
#include "collegium/moe/router_state.h"

namespace collegium::moe {

namespace {

// DeepSeek-V3's guard for sigmoid scores, which may all be tiny; a softmax's K best never sum to zero.
// Experts that were chosen otherwise (forced, balanced, biased, noisy) may: their weights are 0 then.
constexpr double kSigmoidGuard = 1e-20;

// raw / sum(raw): the divisor is 1 for a token without any choice, whose weights are 0, not 0/0.
at::Tensor divisor(const RouterState& state, const at::Tensor& raw_TK) {
  at::Tensor sum_T1 = raw_TK.sum(1, true);
  if (state.options.router.score == ScoreFunction::kSigmoid) sum_T1 = sum_T1 + kSigmoidGuard;
  return at::where(raw_TK.abs().sum(1, true) == 0, at::ones_like(sum_T1), sum_T1);
}

// GShard: the second expert is kept with probability min(1, 2 g2), g2 its normalised weight.
at::Tensor keep_second(const at::Tensor& normalized_TK, const TokenContext& context) {
  const at::Tensor uniform_T1 =
      random_values(context, "router/second_expert", Distribution::kUniform, 1, normalized_TK.scalar_type())
          .to(normalized_TK.device());
  at::Tensor kept_TK = at::ones_like(normalized_TK);
  kept_TK.narrow(1, 1, 1).copy_(uniform_T1 < 2.0 * normalized_TK.narrow(1, 1, 1));
  return kept_TK;
}

}  // namespace

void finish_weights(RouterState& state, RouterOutput& output, const TokenContext& context) {
  const RouterOptions& options = state.options.router;
  Routing& routing = output.routing;
  at::Tensor weights_TK = state.raw_TK;
  if (options.renormalize == Renormalize::kBeforeDrop) {
    state.divisor_T1 = divisor(state, state.raw_TK);
    weights_TK = state.raw_TK / state.divisor_T1;
  }
  state.kept_TK = state.chosen_TK;
  if (options.noise == Noise::kRandomSecondExpert && context.training) {
    const at::Tensor normalized_TK = state.raw_TK / divisor(state, state.raw_TK);
    state.kept_TK = state.kept_TK * keep_second(normalized_TK, context);
  }
  const CapacityOptions& capacity = state.options.capacity;
  if (capacity.drop_policy != DropPolicy::kNone && (context.training || capacity.drop_in_evaluation)) {
    const at::Tensor ids_TK = routing.chosen_ids_TK.masked_fill(state.kept_TK == 0, -1);
    const at::Tensor wanted_TK = state.kept_TK;
    state.kept_TK = kept_slots(state.options, ids_TK, weights_TK, context).to(wanted_TK.scalar_type());
    state.num_dropped = static_cast<std::int64_t>((wanted_TK - state.kept_TK).sum().item<double>());
  }
  if (options.renormalize == Renormalize::kAfterDrop) {
    const at::Tensor kept_raw_TK = state.raw_TK * state.kept_TK;
    state.divisor_T1 = divisor(state, kept_raw_TK);
    weights_TK = kept_raw_TK / state.divisor_T1;
  }
  state.normalized_TK = weights_TK;
  routing.expert_ids_TK = routing.chosen_ids_TK.masked_fill(state.kept_TK == 0, -1);
  routing.weights_TK = weights_TK * state.kept_TK * options.scaling_factor;
}

at::Tensor weights_backward(const RouterState& state, const at::Tensor& grad_weights_TK,
                            const at::Tensor& grad_importance_TK) {
  at::Tensor grad_TK = grad_weights_TK * state.kept_TK * state.options.router.scaling_factor;
  switch (state.options.router.renormalize) {
    case Renormalize::kBeforeDrop: {
      if (grad_importance_TK.defined()) grad_TK = grad_TK + grad_importance_TK;
      const at::Tensor mean_T1 = (grad_TK * state.normalized_TK).sum(1, true);
      return (grad_TK - mean_T1) / state.divisor_T1;
    }
    case Renormalize::kAfterDrop: {
      const at::Tensor mean_T1 = (grad_TK * state.normalized_TK).sum(1, true);
      grad_TK = state.kept_TK * (grad_TK - mean_T1) / state.divisor_T1;
      break;
    }
    case Renormalize::kNever:
      break;
  }
  return grad_importance_TK.defined() ? grad_TK + grad_importance_TK : grad_TK;
}

}  // namespace collegium::moe
