// SPDX-License-Identifier: Apache-2.0
#pragma once

// Routings that dispatchers must survive, on any number of ranks: skewed and adversarial ones.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "collegium/moe/placement.h"

namespace collegium::test {

/// Which choice of which token is asked for.
struct RoutingSlot {
  int rank = 0;
  int num_ranks = 1;
  std::int64_t token = 0;
  std::int64_t choice = 0;
  std::int64_t num_experts = 8;

  /// A local expert of a rank.
  std::int64_t expert_of(int which_rank, std::int64_t local) const {
    const moe::ExpertPlacement placement{.num_experts = num_experts, .num_ranks = num_ranks};
    return placement.first(which_rank) + local;
  }
};

struct RoutingCase {
  std::string name;
  std::int64_t num_experts = 16;  ///< at least two for each of up to 8 ranks
  std::int64_t top_k = 2;
  std::function<std::int64_t(int rank)> tokens = [](int) { return std::int64_t{24}; };
  std::function<std::int64_t(const RoutingSlot&)> expert;  ///< -1 = none

  /// int32 [T, K]
  at::Tensor ids_TK(int rank, int num_ranks) const {
    at::Tensor ids = at::empty({tokens(rank), top_k}, at::kInt);
    auto* out = ids.mutable_data_ptr<std::int32_t>();
    for (std::int64_t slot = 0; slot < ids.numel(); ++slot) {
      out[slot] = static_cast<std::int32_t>(expert({.rank = rank,
                                                    .num_ranks = num_ranks,
                                                    .token = slot / top_k,
                                                    .choice = slot % top_k,
                                                    .num_experts = num_experts}));
    }
    return ids;
  }
};

inline std::int64_t balanced(const RoutingSlot& s) {
  return (3 * s.token + s.rank + 5 * s.choice) % s.num_experts;
}

inline std::vector<RoutingCase> skewed_routings() {
  return {
      {.name = "balanced", .expert = balanced},
      // Four of five tokens choose the same two experts.
      {.name = "hot_experts",
       .expert = [](const RoutingSlot& s) { return s.token % 5 == 0 ? balanced(s) : 3 + s.choice; }},
      {.name = "hot_rank",
       .expert = [](const RoutingSlot& s) { return s.expert_of(1 % s.num_ranks, (s.token + s.choice) % 2); }},
      // The first expert of every rank is hot.
      {.name = "spread_hot",
       .expert =
           [](const RoutingSlot& s) {
             const std::int64_t turn = s.token + s.choice;
             return s.expert_of(static_cast<int>(turn % s.num_ranks), s.choice / s.num_ranks);
           }},
      {.name = "ragged_source",
       .tokens = [](int rank) { return std::int64_t{rank % 3 == 0 ? 1 : 40 * (rank % 3) * (rank % 3)}; },
       .expert = balanced},
      // Odd experts and the upper half of the ranks get nothing.
      {.name = "zero_load",
       .expert = [](const RoutingSlot& s) { return 2 * ((s.token + s.choice) % (s.num_experts / 4)); }},
      {.name = "rotating",
       .expert = [](const RoutingSlot& s) { return (s.token / 4 + s.choice) % s.num_experts; }},
      // Nothing for three quarters of the time, then everything to two experts.
      {.name = "burst",
       .expert = [](const RoutingSlot& s) { return s.token % 16 < 12 ? -1 : s.num_experts - 1 - s.choice; }},
  };
}

inline std::vector<RoutingCase> adversarial_routings() {
  return {
      {.name = "no_tokens_anywhere", .tokens = [](int) { return 0; }, .expert = balanced},
      {.name = "no_tokens_on_a_rank",
       .tokens = [](int rank) { return std::int64_t{rank == 1 ? 0 : 9}; },
       .expert = balanced},
      {.name = "one_token_in_the_world",
       .tokens = [](int rank) { return std::int64_t{rank == 0 ? 1 : 0}; },
       .expert = balanced},
      {.name = "all_dropped", .expert = [](const RoutingSlot&) { return -1; }},
      {.name = "a_rank_drops_all",
       .expert = [](const RoutingSlot& s) { return s.rank == 0 ? -1 : balanced(s); }},
      {.name = "some_dropped",
       .expert =
           [](const RoutingSlot& s) { return (7 * s.token + 3 * s.choice) % 5 == 0 ? -1 : balanced(s); }},
      {.name = "one_expert_gets_all",
       .top_k = 1,
       .expert = [](const RoutingSlot& s) { return s.num_experts - 1; }},
      {.name = "top_one", .top_k = 1, .expert = balanced},
      {.name = "all_experts",
       .num_experts = 8,
       .top_k = 8,
       .expert = [](const RoutingSlot& s) { return (s.token + s.choice) % s.num_experts; }},
      {.name = "experts_do_not_divide", .num_experts = 13, .top_k = 3, .expert = balanced},
      {.name = "ranks_without_experts",
       .num_experts = 3,
       .top_k = 2,
       .expert = [](const RoutingSlot& s) { return (s.token + s.choice) % s.num_experts; }},
  };
}

inline std::vector<RoutingCase> all_routings() {
  std::vector<RoutingCase> all = skewed_routings();
  for (RoutingCase& routing : adversarial_routings()) all.push_back(std::move(routing));
  return all;
}

}  // namespace collegium::test
