// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which rank of an expert-parallel group holds which experts.

#include <cstdint>

#include "collegium/base/error.h"

namespace collegium::moe {

/// Consecutive experts per rank; where the ranks do not divide the experts, the first ranks hold one more:
/// 6 experts on 4 ranks are 2, 2, 1, 1.
struct ExpertPlacement {
  std::int64_t num_experts = 0;
  int num_ranks = 1;

  /// First expert of a rank; first(num_ranks) is num_experts.
  std::int64_t first(int rank) const {
    const std::int64_t small = num_experts / num_ranks;
    const std::int64_t larger_ranks = num_experts % num_ranks;
    return rank * small + (rank < larger_ranks ? rank : larger_ranks);
  }
  std::int64_t count(int rank) const { return first(rank + 1) - first(rank); }
  int rank_of(std::int64_t expert) const {
    const std::int64_t small = num_experts / num_ranks;
    const std::int64_t larger_ranks = num_experts % num_ranks;
    const std::int64_t in_larger = larger_ranks * (small + 1);
    return static_cast<int>(expert < in_larger ? expert / (small + 1)
                                               : larger_ranks + (expert - in_larger) / small);
  }
};

}  // namespace collegium::moe
