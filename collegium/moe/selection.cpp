// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/selection.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "collegium/ops/topk.h"

namespace collegium::moe {

namespace {

// Sum of the n largest along the last dim.
at::Tensor top_sum(const at::Tensor& scores, std::int64_t n) {
  return std::get<0>(at::topk(scores, n, -1)).sum(-1);
}

at::Tensor group_scores(const RouterOptions& options, std::int64_t top_k, const at::Tensor& grouped) {
  const std::int64_t size = grouped.size(2);
  switch (options.group_score) {
    case GroupScore::kMax:
      return at::amax(grouped, -1);
    case GroupScore::kTopTwoSum:
      return top_sum(grouped, std::min<std::int64_t>(2, size));
    case GroupScore::kTopSum:
      return top_sum(grouped, std::clamp<std::int64_t>(top_k / options.top_groups, 1, size));
  }
  return {};
}

}  // namespace

at::Tensor limit_groups(const RouterOptions& options, std::int64_t top_k, const at::Tensor& scores_TE) {
  if (options.num_groups <= 1 || options.top_groups == options.num_groups) return scores_TE;
  const std::int64_t num_tokens = scores_TE.size(0);
  const std::int64_t group_size = scores_TE.size(1) / options.num_groups;
  const at::Tensor grouped = scores_TE.view({num_tokens, options.num_groups, group_size});
  const at::Tensor best =
      ops::topk_stable(group_scores(options, top_k, grouped), options.top_groups).to(at::kLong);
  at::Tensor outside = at::ones({num_tokens, options.num_groups}, scores_TE.options().dtype(at::kBool));
  outside.scatter_(1, best, false);
  return grouped.masked_fill(outside.unsqueeze(2), -std::numeric_limits<double>::infinity())
      .view_as(scores_TE);
}

at::Tensor sinkhorn(const MoeOptions& options, const at::Tensor& logits_TE, const TokenContext& context) {
  const std::int64_t group_tokens = options.capacity.group_sequences * context.sequence_length;
  const double num_experts = static_cast<double>(logits_TE.size(1));
  at::Tensor mass_TE = at::empty_like(logits_TE);
  for (std::int64_t begin = 0; begin < logits_TE.size(0); begin += group_tokens) {
    const std::int64_t size = std::min(group_tokens, logits_TE.size(0) - begin);
    // One token has nobody to be balanced against: equal columns would leave its choice to rounding.
    if (size == 1) {
      mass_TE.narrow(0, begin, 1).copy_(at::softmax(logits_TE.narrow(0, begin, 1), 1));
      continue;
    }
    // In logarithms: neither normalisation can overflow or divide by zero.
    at::Tensor mass = logits_TE.narrow(0, begin, size);
    for (std::int64_t i = 0; i < options.router.sinkhorn_iterations; ++i) {
      mass = mass - at::logsumexp(mass, {1}, true) - std::log(static_cast<double>(size));
      mass = mass - at::logsumexp(mass, {0}, true) - std::log(num_experts);
    }
    mass_TE.narrow(0, begin, size).copy_(at::exp(mass) * size);
  }
  return mass_TE;
}

at::Tensor expert_choice(const MoeOptions& options, const at::Tensor& probs_TE, const TokenContext& context) {
  const std::int64_t num_experts = options.num_experts;
  at::Tensor taken_TE = at::zeros_like(probs_TE, at::kBool);
  const std::int64_t group_tokens = options.capacity.group_sequences * context.sequence_length;
  if (group_tokens == 0) return taken_TE;
  const double mean = options.router.expert_choice_factor / static_cast<double>(num_experts);
  const at::Tensor eligible_TE =
      context.padding_T.defined()
          ? probs_TE.masked_fill(context.padding_T.unsqueeze(1), -std::numeric_limits<double>::infinity())
          : probs_TE;
  for (std::int64_t begin = 0; begin < probs_TE.size(0); begin += group_tokens) {
    const std::int64_t size = std::min(group_tokens, probs_TE.size(0) - begin);
    const auto wanted = static_cast<std::int64_t>(static_cast<double>(size) * mean);
    const std::int64_t capacity = std::clamp<std::int64_t>(wanted, 1, size);
    const at::Tensor by_expert_ES = eligible_TE.narrow(0, begin, size).t().contiguous();
    const at::Tensor tokens_EC = ops::topk_stable(by_expert_ES, capacity).to(at::kLong);
    at::Tensor taken_ES = at::zeros({num_experts, size}, taken_TE.options());
    taken_ES.scatter_(1, tokens_EC, true);
    taken_TE.narrow(0, begin, size).copy_(taken_ES.t());
  }
  if (context.padding_T.defined()) taken_TE.masked_fill_(context.padding_T.unsqueeze(1), false);
  return taken_TE;
}

at::Tensor forced_ids(const MoeOptions& options, const TokenContext& context) {
  const std::int64_t num_experts = options.num_experts;
  const std::int64_t top_k = options.top_k;
  at::Tensor ids_TK = at::empty({context.num_tokens(), top_k}, at::kInt);
  auto* ids = ids_TK.mutable_data_ptr<std::int32_t>();
  const bool skewed = options.router.selection == Selection::kForcedSkew && num_experts > top_k;
  const double hot_share = std::min(
      1.0, options.router.forced_skew * static_cast<double>(top_k) / static_cast<double>(num_experts));
  for (std::int64_t token = 0; token < context.num_tokens(); ++token) {
    const std::int64_t global = context.first_token() + token;
    // Bresenham's line: the hot tokens are spread evenly, and any prefix has the right share.
    const bool hot = std::floor(static_cast<double>(global + 1) * hot_share) >
                     std::floor(static_cast<double>(global) * hot_share);
    for (std::int64_t k = 0; k < top_k; ++k) {
      std::int64_t expert = (global * top_k + k) % num_experts;
      if (skewed) expert = hot && k == 0 ? 0 : 1 + (global * top_k + k) % (num_experts - 1);
      ids[token * top_k + k] = static_cast<std::int32_t>(expert);
    }
  }
  return ids_TK;
}

}  // namespace collegium::moe
