// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the router decided for the tokens of this rank, and what the balance losses need to know of it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace collegium::moe {

/// Which tokens a forward pass sees. Random numbers, capacity groups and per-sequence losses follow the
/// *global* position of a token, so none of them depends on how sequences are spread over ranks.
struct TokenContext {
  std::int64_t num_sequences = 1;    ///< B, on this rank
  std::int64_t sequence_length = 0;  ///< S; T = B S
  std::int64_t first_sequence =
      0;                         ///< index of this rank's first sequence in the optimizer step's global batch
  std::int64_t past_tokens = 0;  ///< of a sequence that is generated: those before the first one here
  std::uint64_t seed = 0;
  std::int64_t step = 0;  ///< optimizer step
  std::int64_t layer = 0;
  bool training = false;  ///< noise, drops and Sinkhorn apply
  at::Tensor padding_T;   ///< bool, true = padding (neither routed nor counted); undefined = none

  std::int64_t num_tokens() const { return num_sequences * sequence_length; }
  /// Global index of this rank's first token within the optimizer step.
  std::int64_t first_token() const { return first_sequence * sequence_length + past_tokens; }
};

/// The decision. A token's slots are ordered by (score descending, expert id ascending); where the experts
/// choose there is one for every expert, in their order, and forced or replayed choices keep their own. A
/// slot that goes nowhere (dropped, padding, second expert not taken) has expert id -1 and weight 0.
struct Routing {
  at::Tensor expert_ids_TK;  ///< int32, -1 = no expert
  at::Tensor weights_TK;     ///< router dtype (fp32, or fp64 for a float64 model)
  at::Tensor chosen_ids_TK;  ///< int32, the choices before any drop (the record of routing holds these)
};

/// Sums over this rank's tokens, from which every balance loss and monitor is computed. Ranks add them up.
/// Rows are sequences (B); `scope = batch` losses add the rows.
struct RouterStatistics {
  at::Tensor num_tokens_B;       ///< int64, tokens that are not padding
  at::Tensor choice_counts_BE;   ///< int64, choices per expert before any drop, all K
  at::Tensor first_counts_BE;    ///< int64, choices in slot 0 per expert before any drop
  at::Tensor prob_sums_BE;       ///< router dtype: sum of (normalised) scores over all E
  at::Tensor importance_BE;      ///< router dtype: sum of the selected weights per expert
  at::Tensor load_BE;            ///< router dtype: smooth load of noisy top-K; undefined otherwise
  at::Tensor squared_lse_B;      ///< router dtype: sum of logsumexp(logits)^2
  at::Tensor entropy_B;          ///< router dtype: sum over tokens of -sum_e p log p
  std::int64_t num_dropped = 0;  ///< slots over capacity (not those that random_second_expert leaves out)
  double max_abs_logit = 0.0;
};

/// dLoss/d(statistics), the only thing the router's backward needs from a balance loss. Undefined = zero.
struct RouterStatisticsGradient {
  at::Tensor prob_sums_BE;   ///< [B, E] or [1, E] (the same for every sequence)
  at::Tensor importance_BE;  ///< likewise
  at::Tensor load_BE;        ///< likewise
  double squared_lse = 0.0;
};

}  // namespace collegium::moe
