// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/skews.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"

namespace collegium::moe {

namespace {

using Experts = std::vector<std::int32_t>;

Experts range(std::int64_t begin, std::int64_t end) {
  Experts experts(static_cast<std::size_t>(end - begin));
  std::iota(experts.begin(), experts.end(), static_cast<std::int32_t>(begin));
  return experts;
}

Experts without(const Experts& experts, const Experts& removed) {
  Experts kept;
  for (const std::int32_t expert : experts) {
    if (std::find(removed.begin(), removed.end(), expert) == removed.end()) kept.push_back(expert);
  }
  return kept;
}

/// What a token chooses: first those of `first`, then the rest of its K from `pool`, which goes round: all
/// tokens before took `turn` from it.
struct Choice {
  Experts first;
  const Experts* pool = nullptr;
  std::int64_t turn = 0;
};
using ChoiceOf = std::function<Choice(std::int64_t token)>;

at::Tensor fill(const SkewShape& shape, std::int64_t first_token, std::int64_t num_tokens,
                const ChoiceOf& choice_of) {
  at::Tensor ids_TK = at::empty({num_tokens, shape.top_k}, at::kInt);
  auto* next = ids_TK.mutable_data_ptr<std::int32_t>();
  for (std::int64_t token = first_token; token < first_token + num_tokens; ++token) {
    const Choice choice = choice_of(token);
    next = std::copy(choice.first.begin(), choice.first.end(), next);
    const std::int64_t rest = shape.top_k - static_cast<std::int64_t>(choice.first.size());
    for (std::int64_t i = 0; i < rest; ++i)
      *next++ = (*choice.pool)[static_cast<std::size_t>(choice.turn + i) % choice.pool->size()];
  }
  return ids_TK;
}

// Choices from the pool of the tokens before one, where even tokens take `even` and odd ones `odd`.
std::int64_t turn_of(std::int64_t token, std::int64_t even, std::int64_t odd) {
  return (token + 1) / 2 * even + token / 2 * odd;
}

void require_enough(const Experts& pool, std::int64_t wanted, std::string_view skew, std::string_view which) {
  require_config(static_cast<std::int64_t>(pool.size()) >= wanted,
                 "skew {}: a token chooses {} of {}, but there are {}", skew, wanted, which, pool.size());
}

// Every second token chooses the hot expert.
at::Tensor hot_expert(const SkewShape& shape, std::int32_t hot, std::int64_t first_token,
                      std::int64_t num_tokens) {
  const Experts others = without(range(0, shape.num_experts), {hot});
  require_enough(others, shape.top_k, "W1 or W6", "the experts that are not hot");
  return fill(shape, first_token, num_tokens, [&](std::int64_t token) {
    return Choice{.first = token % 2 == 0 ? Experts{hot} : Experts{},
                  .pool = &others,
                  .turn = turn_of(token, shape.top_k - 1, shape.top_k)};
  });
}

at::Tensor hot_rank(const SkewShape& shape, std::int64_t first_token, std::int64_t num_tokens) {
  const ExpertPlacement placement{.num_experts = shape.num_experts, .num_ranks = shape.num_ranks};
  const Experts all = range(0, shape.num_experts);
  const Experts here = range(0, placement.count(0));
  const Experts elsewhere = range(placement.count(0), shape.num_experts);
  const auto hot = std::min<std::int64_t>(shape.top_k, placement.count(0));
  require_enough(elsewhere, shape.top_k - hot, "W2", "the other ranks' experts");
  return fill(shape, first_token, num_tokens, [&](std::int64_t token) {
    if (token % 4 == 3) return Choice{.first = {}, .pool = &all, .turn = token / 4 * shape.top_k};
    const std::int64_t earlier = token / 4 * 3 + token % 4;  // that choose among the first rank's
    Choice choice{.first = {}, .pool = &elsewhere, .turn = earlier * (shape.top_k - hot)};
    for (std::int64_t k = 0; k < hot; ++k)
      choice.first.push_back(here[static_cast<std::size_t>(earlier * hot + k) % here.size()]);
    return choice;
  });
}

at::Tensor spread_hot(const SkewShape& shape, std::int64_t first_token, std::int64_t num_tokens) {
  const ExpertPlacement placement{.num_experts = shape.num_experts, .num_ranks = shape.num_ranks};
  Experts hot;
  for (int rank = 0; rank < shape.num_ranks; ++rank)
    hot.push_back(static_cast<std::int32_t>(placement.first(rank)));
  const Experts others = without(range(0, shape.num_experts), hot);
  const auto taken = std::min<std::int64_t>(shape.top_k, shape.num_ranks);
  require_enough(others, shape.top_k, "W3", "the experts that are not hot");
  return fill(shape, first_token, num_tokens, [&](std::int64_t token) {
    Choice choice{.first = {}, .pool = &others, .turn = turn_of(token, shape.top_k - taken, shape.top_k)};
    for (std::int64_t k = 0; token % 2 == 0 && k < taken; ++k)
      choice.first.push_back(hot[static_cast<std::size_t>(token / 2 * taken + k) % hot.size()]);
    return choice;
  });
}

at::Tensor from_pool(const SkewShape& shape, const Experts& pool, std::string_view skew,
                     std::int64_t first_token, std::int64_t num_tokens) {
  require_enough(pool, shape.top_k, skew, "the experts that get tokens");
  return fill(shape, first_token, num_tokens, [&](std::int64_t token) {
    return Choice{.first = {}, .pool = &pool, .turn = token * shape.top_k};
  });
}

}  // namespace

std::vector<std::int64_t> skewed_shares(Skew skew, std::int64_t num_tokens, int num_ranks) {
  std::vector<std::int64_t> shares;
  const std::int64_t ranks = num_ranks;
  for (std::int64_t r = 0; r < ranks; ++r) {
    // The first r ranks bring r^2 / R^2.
    const std::int64_t begin =
        skew == Skew::kRaggedSource ? num_tokens * r * r / (ranks * ranks) : num_tokens * r / ranks;
    const std::int64_t end = skew == Skew::kRaggedSource ? num_tokens * (r + 1) * (r + 1) / (ranks * ranks)
                                                         : num_tokens * (r + 1) / ranks;
    shares.push_back(end - begin);
  }
  return shares;
}

at::Tensor skewed_ids_TK(Skew skew, const SkewShape& shape, std::int64_t step, std::int64_t first_token,
                         std::int64_t num_tokens) {
  const ExpertPlacement placement{.num_experts = shape.num_experts, .num_ranks = shape.num_ranks};
  const Experts all = range(0, shape.num_experts);
  switch (skew) {
    case Skew::kBalanced:
    case Skew::kRaggedSource:
      return from_pool(shape, all, "W0", first_token, num_tokens);
    case Skew::kHotExperts:
      return hot_expert(shape, 0, first_token, num_tokens);
    case Skew::kHotRank:
      return hot_rank(shape, first_token, num_tokens);
    case Skew::kSpreadHot:
      return spread_hot(shape, first_token, num_tokens);
    case Skew::kZeroLoad: {
      const std::int64_t loaded = shape.num_ranks > 1 ? placement.first(shape.num_ranks - 1)
                                                      : shape.num_experts - shape.num_experts / 2;
      return from_pool(shape, range(0, loaded), "W5", first_token, num_tokens);
    }
    case Skew::kRotating:
      return hot_expert(shape, static_cast<std::int32_t>(step % shape.num_experts), first_token, num_tokens);
    case Skew::kBurst: {
      constexpr std::int64_t kPeriod = 4;
      const Experts burst = range(0, shape.top_k);
      return from_pool(shape, step % kPeriod == 0 ? burst : all, "W7", first_token, num_tokens);
    }
  }
  throw InternalError("unknown skew");
}

at::Tensor random_ids_TK(const SkewShape& shape, std::int64_t step, std::int64_t first_token,
                         std::int64_t num_tokens) {
  const RandomStream random(1, "moe/random_ids", static_cast<std::uint64_t>(step));
  Experts deck(static_cast<std::size_t>(shape.num_experts));
  at::Tensor ids_TK = at::empty({num_tokens, shape.top_k}, at::kInt);
  auto* next = ids_TK.mutable_data_ptr<std::int32_t>();
  for (std::int64_t token = first_token; token < first_token + num_tokens; ++token) {
    std::iota(deck.begin(), deck.end(), 0);
    for (std::int64_t k = 0; k < shape.top_k; ++k) {
      const double u = random.uniform(static_cast<std::uint64_t>(token), static_cast<std::uint64_t>(k));
      const auto drawn = k + static_cast<std::int64_t>(u * static_cast<double>(shape.num_experts - k));
      std::swap(deck[static_cast<std::size_t>(k)], deck[static_cast<std::size_t>(drawn)]);
      *next++ = deck[static_cast<std::size_t>(k)];
    }
  }
  return ids_TK;
}

}  // namespace collegium::moe
