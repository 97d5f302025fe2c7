// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which experts a token asks for, before any drop. Selections carry no gradient.

#include <ATen/core/Tensor.h>

#include "collegium/moe/options.h"
#include "collegium/moe/routing.h"

namespace collegium::moe {

/// What     Masks the experts outside a token's best `top_groups` groups with -infinity.
/// Math     A group's score is the max, the sum of the top two, or the sum of the top (K / top_groups) of
///          its scores.
/// Shape    scores_TE [T, E] -> [T, E]. The identity for one group.
/// Ref      [DeepSeekV3, Sec 2.1.2] arXiv 2412.19437 (top two); [DeepSeekV2, Sec 2.2.2] arXiv 2405.04434
///          (max)
at::Tensor limit_groups(const RouterOptions& options, std::int64_t top_k, const at::Tensor& scores_TE);

/// What     Alternately normalises rows and columns of exp(logits) so that experts get equal mass from each
///          group of whole sequences, so that the choice does not depend on how sequences are spread.
/// Shape    logits_TE [T, E] -> masses [T, E]. A token's sum to about 1, as its probabilities would: scores
///          of groups add them, and the loss-free bias is added to them. In a group of one token they are its
///          probabilities.
/// Ref      [Clark2022, Sec 3.2] arXiv 2202.01169
at::Tensor sinkhorn(const MoeOptions& options, const at::Tensor& logits_TE, const TokenContext& context);

/// What     Every expert takes its C = max(1, floor(S c / E)) best tokens of each group of whole sequences
///          (expert_choice_capacity()), padding not counted.
/// Shape    probs_TE [T, E] -> bool [T, E], true = the expert takes the token.
/// Ref      [Zhou2022, Sec 3.1] arXiv 2202.09368
at::Tensor expert_choice(const MoeOptions& options, const at::Tensor& probs_TE, const TokenContext& context);

/// What     Assignments for benchmarks, by global token index alone. Balanced: slot n of all slots goes to
///          expert n mod E. Skewed: expert 0 is the first choice of a share skew K / E of the tokens; all
///          else is spread evenly.
/// Shape    int32 [T, K], distinct within a token.
at::Tensor forced_ids(const MoeOptions& options, const TokenContext& context);

}  // namespace collegium::moe
