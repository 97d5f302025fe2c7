// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/router.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "collegium/base/error.h"
#include "collegium/moe/noise.h"
#include "collegium/moe/router_state.h"
#include "collegium/moe/selection.h"
#include "collegium/ops/softmax_rows.h"
#include "collegium/ops/topk.h"
#include "collegium/ops/wide_linear.h"

namespace collegium::moe {

namespace {

at::ScalarType router_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// 1. The router's input and logits, in the router's dtype before the product.
void compute_logits(const RouterWeights& weights, const at::Tensor& x_TD, const TokenContext& context,
                    RouterState& state) {
  const RouterOptions& options = state.options.router;
  const auto dtype = router_dtype(x_TD.scalar_type());
  state.x_TD = x_TD.detach();
  state.compute_dtype = x_TD.scalar_type();
  state.gate_ED = weights.gate_ED.to(dtype);
  state.input_jitter = options.noise == Noise::kJitterInput;
  if (context.training && (options.noise == Noise::kJitterRouter || state.input_jitter)) {
    const at::Tensor uniform_TD =
        random_values(context, "router/jitter", Distribution::kUniform, x_TD.size(1), dtype)
            .to(x_TD.device());
    state.jitter_TD = 1.0 - options.jitter_epsilon + 2.0 * options.jitter_epsilon * uniform_TD;
    state.x_TD = state.x_TD.to(dtype) * state.jitter_TD;
  }
  state.clean_TE = ops::wide_linear(state.x_TD, state.gate_ED);
  if (options.noise == Noise::kNoisyTopK && context.training) {
    state.noise_ED = weights.noise_ED.to(dtype);
    const at::Tensor normal_TE =
        random_values(context, "router/noisy_top_k", Distribution::kNormal, state.options.num_experts, dtype);
    state.noisy = add_learned_noise(state.clean_TE, ops::wide_linear(state.x_TD, state.noise_ED),
                                    normal_TE.to(x_TD.device()));
    state.load = smooth_load(state.noisy, state.options.top_k);
  }
}

bool is_noisy(const RouterState& state) { return state.noisy.noisy_TE.defined(); }

const at::Tensor& logits(const RouterState& state) {
  return is_noisy(state) ? state.noisy.noisy_TE : state.clean_TE;
}

// For the gradient of the z-loss; that of softmax scores of the clean logits has it in the scores.
bool reads_logits_backward(const RouterState& state) {
  return state.options.router.score == ScoreFunction::kSigmoid || is_noisy(state);
}

// 2. Scores of the (noisy) logits, and what the statistics want of the clean ones.
void compute_scores(RouterState& state) {
  if (state.options.router.score == ScoreFunction::kSigmoid) {
    state.scores_TE = at::sigmoid(logits(state));
    // All scores of a token may underflow: its probabilities are 0 then, not 0/0.
    const at::Tensor sum_T1 = state.scores_TE.sum(1, true);
    state.score_sum_T1 = at::where(sum_T1.eq(0), at::ones_like(sum_T1), sum_T1);
    state.lse_T1 = at::logsumexp(state.clean_TE, {1}, true);
    return;
  }
  const ops::SoftmaxRows rows = ops::softmax_rows(logits(state));
  state.scores_TE = rows.probs_TE;
  state.entropy_T1 = rows.entropy_T1;
  state.lse_T1 = is_noisy(state) ? at::logsumexp(state.clean_TE, {1}, true) : rows.lse_T1;
}

// 3. The K experts that every token asks for; -1 = none.
at::Tensor select(const RouterWeights& weights, const TokenContext& context, const RouterState& state) {
  const MoeOptions& options = state.options;
  const RouterOptions& router = options.router;
  if (router.selection == Selection::kForcedBalance || router.selection == Selection::kForcedSkew) {
    return forced_ids(options, context).to(state.x_TD.device());
  }
  if (router.selection == Selection::kExpertChoice) {
    const at::Tensor taken_TE = expert_choice(options, state.scores_TE, context);
    const at::Tensor ids_E = at::arange(options.num_experts, state.gate_ED.options().dtype(at::kInt));
    return at::where(taken_TE, ids_E.unsqueeze(0), at::full({}, -1, ids_E.options()));
  }
  at::Tensor preference_TE = router.order == ScoreOrder::kSelectFirst ? logits(state) : state.scores_TE;
  if (context.training && router.selection == Selection::kSinkhorn) {
    preference_TE = sinkhorn(options, logits(state), context);
  }
  if (context.training && router.noise == Noise::kGumbel) {
    preference_TE = logits(state) + random_values(context, "router/gumbel", Distribution::kGumbel,
                                                  options.num_experts, state.gate_ED.scalar_type())
                                        .to(state.x_TD.device());
  }
  if (weights.expert_bias_E.defined()) preference_TE = preference_TE + weights.expert_bias_E;
  return ops::topk_stable(limit_groups(router, options.top_k, preference_TE), options.top_k);
}

at::Tensor without_padding(const at::Tensor& ids_TK, const TokenContext& context) {
  if (!context.padding_T.defined()) return ids_TK;
  return ids_TK.masked_fill(context.padding_T.unsqueeze(1), -1);
}

// 4. Weights before renormalisation.
void compute_raw_weights(const at::Tensor& chosen_ids_TK, RouterState& state) {
  const at::Tensor ids_TK = chosen_ids_TK.to(at::kLong);
  state.slot_ids_TK = ids_TK.clamp_min(0);
  state.chosen_TK = (ids_TK >= 0).to(state.gate_ED.scalar_type());
  const bool softmax_of_selected = state.options.router.order == ScoreOrder::kSelectFirst &&
                                   state.options.router.score == ScoreFunction::kSoftmax;
  if (!softmax_of_selected) {
    state.raw_TK = state.scores_TE.gather(1, state.slot_ids_TK) * state.chosen_TK;
    return;
  }
  constexpr double kLowest = -1e30;  // finite: a token without choices must not become NaN
  const at::Tensor selected_TK =
      logits(state).gather(1, state.slot_ids_TK).masked_fill(state.chosen_TK == 0, kLowest);
  state.raw_TK = at::softmax(selected_TK, 1) * state.chosen_TK;
}

}  // namespace

RouterOutput route(const MoeOptions& options, const RouterWeights& weights, const at::Tensor& x_TD,
                   const TokenContext& context, const at::Tensor& replayed_ids_TK) {
  COLLEGIUM_CHECK(x_TD.dim() == 2 && x_TD.size(0) == context.num_tokens(), "{} rows for {} tokens",
                  x_TD.size(0), context.num_tokens());
  const at::NoGradGuard no_grad;
  RouterOutput output;
  output.state = std::make_shared<RouterState>();
  RouterState& state = *output.state;
  state.options = options;
  state.num_sequences = context.num_sequences;
  compute_logits(weights, x_TD, context, state);
  if (context.padding_T.defined()) {
    state.valid_T1 = context.padding_T.logical_not().unsqueeze(1).to(state.gate_ED.scalar_type());
  }
  compute_scores(state);

  const at::Tensor wanted_TK = replayed_ids_TK.defined() ? replayed_ids_TK : select(weights, context, state);
  output.routing.chosen_ids_TK = without_padding(wanted_TK, context).contiguous();
  compute_raw_weights(output.routing.chosen_ids_TK, state);
  finish_weights(state, output, context);
  output.statistics = collect_statistics(state, output.routing.chosen_ids_TK, context);
  output.expert_input_TD =
      state.input_jitter && state.jitter_TD.defined() ? state.x_TD.to(x_TD.scalar_type()) : x_TD.detach();
  if (!reads_logits_backward(state)) state.clean_TE.reset();
  return output;
}

namespace {

// dLoss/d(scores) of the statistics' probability sums; every token of a sequence has its sequence's row.
at::Tensor per_token(const RouterState& state, const at::Tensor& rows_BE) {
  const std::int64_t num_tokens = state.x_TD.size(0);
  const std::int64_t length = state.num_sequences == 0 ? 0 : num_tokens / state.num_sequences;
  const at::Tensor all_BE = rows_BE.expand({state.num_sequences, rows_BE.size(1)});
  at::Tensor rows_TE = all_BE.unsqueeze(1)
                           .expand({state.num_sequences, length, rows_BE.size(1)})
                           .reshape({num_tokens, rows_BE.size(1)});
  return state.valid_T1.defined() ? rows_TE * state.valid_T1 : rows_TE;
}

// dLoss/d(logsumexp of the clean logits), or undefined.
at::Tensor lse_gradient(const RouterState& state, const RouterStatisticsGradient& statistics) {
  if (statistics.squared_lse == 0.0) return {};
  const at::Tensor grad_T1 = 2.0 * statistics.squared_lse * state.lse_T1;
  return state.valid_T1.defined() ? grad_T1 * state.valid_T1 : grad_T1;
}

// dLoss/d(noisy logits) of sigmoid scores: of the raw weights and of the statistics' probabilities,
// scores / their sum.
at::Tensor sigmoid_gradient(const RouterState& state, const at::Tensor& grad_slots_TK,
                            const RouterStatisticsGradient& statistics) {
  at::Tensor grad_TE = at::zeros_like(state.scores_TE);
  if (statistics.prob_sums_BE.defined()) {
    const at::Tensor coefficient_TE = per_token(state, statistics.prob_sums_BE);
    const at::Tensor mean_T1 = (coefficient_TE * (state.scores_TE / state.score_sum_T1)).sum(1, true);
    grad_TE = (coefficient_TE - mean_T1) / state.score_sum_T1;
  }
  // The slots of a token name different experts, except that absent ones point to expert 0 and carry exactly
  // zero.
  grad_TE = grad_TE.scatter_add(1, state.slot_ids_TK, grad_slots_TK);
  return grad_TE * state.scores_TE * (1 - state.scores_TE);
}

// The same of softmax scores, with the share of the clean logits' logsumexp where these are the noisy ones.
at::Tensor softmax_gradient(const RouterState& state, const at::Tensor& grad_raw_TK,
                            const RouterStatisticsGradient& statistics) {
  const bool select_first = state.options.router.order == ScoreOrder::kSelectFirst;
  const at::Tensor grad_TE = ops::softmax_rows_backward(
      state.scores_TE, {.sequence_BE = statistics.prob_sums_BE,
                        .valid_T1 = state.valid_T1,
                        .slot_ids_TK = state.slot_ids_TK,
                        .slots_TK = select_first ? at::Tensor() : grad_raw_TK * state.chosen_TK,
                        .lse_T1 = is_noisy(state) ? at::Tensor() : lse_gradient(state, statistics)});
  if (!select_first) return grad_TE;
  const at::Tensor inner_T1 = (grad_raw_TK * state.raw_TK).sum(1, true);
  return grad_TE.scatter_add(1, state.slot_ids_TK, state.raw_TK * (grad_raw_TK - inner_T1));
}

// Of the logits, the learned noise (undefined without it) and the experts' share, through the jitter.
at::Tensor input_gradient(const RouterState& state, const at::Tensor& grad_clean_TE,
                          const at::Tensor& grad_noise_TD, const at::Tensor& grad_expert_input_TD) {
  if (!grad_noise_TD.defined() && !state.jitter_TD.defined())
    return ops::wide_linear_grad_input(grad_clean_TE, state.gate_ED, grad_expert_input_TD,
                                       state.compute_dtype);
  at::Tensor grad_TD = at::mm(grad_clean_TE, state.gate_ED);
  if (grad_noise_TD.defined()) grad_TD = grad_TD + grad_noise_TD;
  if (state.jitter_TD.defined()) grad_TD = grad_TD * state.jitter_TD;
  if (!grad_expert_input_TD.defined()) return grad_TD.to(state.compute_dtype);
  const bool jittered = state.input_jitter && state.jitter_TD.defined();
  return (grad_TD + (jittered ? grad_expert_input_TD * state.jitter_TD : grad_expert_input_TD))
      .to(state.compute_dtype);
}

}  // namespace

RouterGradients route_backward(const RouterState& state, const at::Tensor& grad_weights_TK,
                               const RouterStatisticsGradient& grad_statistics,
                               const at::Tensor& grad_expert_input_TD) {
  const at::NoGradGuard no_grad;
  at::Tensor grad_importance_TK;
  if (grad_statistics.importance_BE.defined()) {
    grad_importance_TK =
        per_token(state, grad_statistics.importance_BE).gather(1, state.slot_ids_TK) * state.chosen_TK;
  }
  const at::Tensor grad_raw_TK = weights_backward(state, grad_weights_TK, grad_importance_TK);
  const bool sigmoid = state.options.router.score == ScoreFunction::kSigmoid;
  const at::Tensor grad_logits_TE =
      sigmoid ? sigmoid_gradient(state, grad_raw_TK * state.chosen_TK, grad_statistics)
              : softmax_gradient(state, grad_raw_TK, grad_statistics);

  RouterGradients gradients;
  at::Tensor grad_clean_TE = grad_logits_TE;
  if (is_noisy(state)) {
    const at::Tensor grad_load_TE =
        grad_statistics.load_BE.defined() ? per_token(state, grad_statistics.load_BE) : at::Tensor();
    const NoisyGradients noisy = noisy_backward(state.noisy, state.load, grad_logits_TE, grad_load_TE);
    grad_clean_TE = noisy.clean_TE;
    gradients.noise_ED = ops::wide_linear_grad_weight(noisy.raw_std_TE, state.x_TD);
    gradients.x_TD = at::mm(noisy.raw_std_TE, state.noise_ED);
  }
  const at::Tensor grad_lse_T1 = lse_gradient(state, grad_statistics);
  if (grad_lse_T1.defined() && reads_logits_backward(state))
    grad_clean_TE = grad_clean_TE + grad_lse_T1 * at::exp(state.clean_TE - state.lse_T1);
  gradients.gate_ED = ops::wide_linear_grad_weight(grad_clean_TE, state.x_TD);
  gradients.x_TD = input_gradient(state, grad_clean_TE, gradients.x_TD, grad_expert_input_TD);
  return gradients;
}

}  // namespace collegium::moe
