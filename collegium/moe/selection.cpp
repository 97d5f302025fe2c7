// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/selection.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/masked_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "collegium/moe/capacity.h"
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

namespace {

// Calls fn(rows) for every group of whole sequences with the indices of its tokens, padding left out.
void for_each_group(const MoeOptions& options, const TokenContext& context, const at::Tensor& like,
                    const std::function<void(const at::Tensor& rows)>& fn) {
  const std::int64_t group_tokens = options.capacity.group_sequences * context.sequence_length;
  const at::Tensor all_T = at::arange(context.num_tokens(), like.options().dtype(at::kLong));
  for (std::int64_t begin = 0; begin < context.num_tokens(); begin += group_tokens) {
    const std::int64_t size = std::min(group_tokens, context.num_tokens() - begin);
    at::Tensor rows = all_T.narrow(0, begin, size);
    if (context.padding_T.defined())
      rows =
          at::masked_select(rows, context.padding_T.narrow(0, begin, size).logical_not().to(like.device()));
    if (rows.size(0) > 0) fn(rows);
  }
}

at::Tensor balanced_masses(const at::Tensor& logits_SE, std::int64_t iterations) {
  const std::int64_t size = logits_SE.size(0);
  // One token has nobody to be balanced against: equal columns would leave its choice to rounding.
  if (size == 1) return at::softmax(logits_SE, 1);
  const double num_experts = static_cast<double>(logits_SE.size(1));
  // In logarithms: neither normalisation can overflow or divide by zero.
  at::Tensor mass = logits_SE;
  for (std::int64_t i = 0; i < iterations; ++i) {
    mass = mass - at::logsumexp(mass, {1}, true) - std::log(static_cast<double>(size));
    mass = mass - at::logsumexp(mass, {0}, true) - std::log(num_experts);
  }
  return at::exp(mass) * size;
}

}  // namespace

at::Tensor sinkhorn(const MoeOptions& options, const at::Tensor& logits_TE, const TokenContext& context) {
  at::Tensor mass_TE = at::zeros_like(logits_TE);
  for_each_group(options, context, logits_TE, [&](const at::Tensor& rows) {
    mass_TE.index_copy_(0, rows,
                        balanced_masses(logits_TE.index_select(0, rows), options.router.sinkhorn_iterations));
  });
  return mass_TE;
}

at::Tensor expert_choice(const MoeOptions& options, const at::Tensor& probs_TE, const TokenContext& context) {
  at::Tensor taken_TE = at::zeros_like(probs_TE, at::kBool);
  for_each_group(options, context, probs_TE, [&](const at::Tensor& rows) {
    const std::int64_t size = rows.size(0);
    const at::Tensor by_expert_ES = probs_TE.index_select(0, rows).t().contiguous();
    const at::Tensor tokens_EC =
        ops::topk_stable(by_expert_ES, expert_choice_capacity(options, size)).to(at::kLong);
    const at::Tensor taken_ES = at::zeros({options.num_experts, size}, taken_TE.options());
    taken_ES.scatter_(1, tokens_EC, true);
    taken_TE.index_copy_(0, rows, taken_ES.t());
  });
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
    const auto hot_before = static_cast<std::int64_t>(std::floor(static_cast<double>(global) * hot_share));
    const bool hot =
        std::floor(static_cast<double>(global + 1) * hot_share) > static_cast<double>(hot_before);
    for (std::int64_t k = 0; k < top_k; ++k) {
      std::int64_t expert = (global * top_k + k) % num_experts;
      // All choices but the hot ones, numbered through, go round the other experts.
      const std::int64_t number = global * top_k + k - hot_before - (hot ? 1 : 0);
      if (skewed) expert = hot && k == 0 ? 0 : 1 + number % (num_experts - 1);
      ids[token * top_k + k] = static_cast<std::int32_t>(expert);
    }
  }
  return ids_TK;
}

}  // namespace collegium::moe
