// SPDX-License-Identifier: Apache-2.0
#pragma once

// Which of a micro-step's sequences a rank takes.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "collegium/base/error.h"

namespace collegium::parallel {

/// Consecutive sequences.
struct Share {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// What     Rank `rank`'s share of `num_sequences`, cut into whole groups of `group` sequences (what shares a
///          capacity is never torn apart): the first ranks take one group more where the ranks do not divide
///          them, and the last ones may get nothing.
inline Share share_of(std::int64_t num_sequences, std::int64_t group, int num_ranks, int rank) {
  COLLEGIUM_CHECK(num_sequences % group == 0, "{} sequences in groups of {}", num_sequences, group);
  const std::int64_t num_groups = num_sequences / group;
  const std::int64_t small = num_groups / num_ranks;
  const std::int64_t larger_ranks = num_groups % num_ranks;
  return {.first = (rank * small + std::min<std::int64_t>(rank, larger_ranks)) * group,
          .count = (small + (rank < larger_ranks ? 1 : 0)) * group};
}

/// What     The shares' counts times `factor`, of all ranks: rows of an all_gather in sequence order.
inline std::vector<std::int64_t> share_rows(std::int64_t num_sequences, std::int64_t group, int num_ranks,
                                            std::int64_t factor) {
  std::vector<std::int64_t> rows;
  rows.reserve(static_cast<std::size_t>(num_ranks));
  for (int rank = 0; rank < num_ranks; ++rank)
    rows.push_back(share_of(num_sequences, group, num_ranks, rank).count * factor);
  return rows;
}

}  // namespace collegium::parallel
