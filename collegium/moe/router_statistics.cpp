// SPDX-License-Identifier: Apache-2.0

// The router's sums over tokens, which losses and monitors are computed from.

#include <ATen/core/Tensor.h>
#include <ATen/ops/log.h>
#include <ATen/ops/ones.h>

#include "collegium/moe/router_state.h"
#include "collegium/ops/choice_sums.h"

namespace collegium::moe {

namespace {

at::Tensor entropy(const RouterState& state, const at::Tensor& probs_TE) {
  if (state.entropy_T1.defined()) return state.entropy_T1;
  // 0 log 0 = 0; at::xlogy has no vector form.
  return -(probs_TE * at::log(probs_TE.clamp_min(1e-37))).sum(1, true);
}

at::Tensor sum_by_sequence(const at::Tensor& values, std::int64_t num_sequences, std::int64_t length) {
  return values.reshape({num_sequences, length, values.size(1)}).sum(1);
}

}  // namespace

RouterStatistics collect_statistics(const RouterState& state, const at::Tensor& chosen_ids_TK,
                                    const TokenContext& context) {
  const std::int64_t num_sequences = context.num_sequences;
  const std::int64_t length = context.sequence_length;
  const auto by_sequence = [&](const at::Tensor& values) {
    return sum_by_sequence(state.valid_T1.defined() ? values * state.valid_T1 : values, num_sequences,
                           length);
  };
  const at::Tensor probs_TE =
      state.score_sum_T1.defined() ? state.scores_TE / state.score_sum_T1 : state.scores_TE;
  const bool before_drop = state.options.router.renormalize == Renormalize::kBeforeDrop;
  const at::Tensor importance_TK = before_drop ? state.normalized_TK : state.raw_TK;
  const ops::ChoiceSums choices =
      ops::sum_choices(chosen_ids_TK, importance_TK, num_sequences, state.options.num_experts);

  RouterStatistics statistics;
  const at::Tensor ones_T1 = at::ones({context.num_tokens(), 1}, state.scores_TE.options());
  statistics.num_tokens_B = by_sequence(ones_T1).reshape({num_sequences}).to(at::kLong);
  statistics.choice_counts_BE = choices.counts_BE;
  statistics.first_counts_BE = choices.first_counts_BE;
  statistics.prob_sums_BE = by_sequence(probs_TE);
  statistics.importance_BE = choices.weights_BE;
  if (state.load.probability_TE.defined()) statistics.load_BE = by_sequence(state.load.probability_TE);
  statistics.squared_lse_B = by_sequence(state.lse_T1 * state.lse_T1).reshape({num_sequences});
  statistics.entropy_B = by_sequence(entropy(state, probs_TE)).reshape({num_sequences});
  statistics.num_dropped = state.num_dropped;
  const at::Tensor logits_TE = state.valid_T1.defined() ? state.clean_TE * state.valid_T1 : state.clean_TE;
  if (logits_TE.numel() > 0) statistics.max_abs_logit = logits_TE.abs().max().item<double>();
  return statistics;
}

}  // namespace collegium::moe
