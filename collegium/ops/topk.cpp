// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/topk.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

// Rows per task: long enough to pay for waking a thread (a row costs some 100 ns).
constexpr std::int64_t kSelectRowsPerTask = 128;

constexpr std::int64_t kLanes = 16;
constexpr std::int64_t kMostPasses = 32;  // above, sorting is cheaper

double comparable(double score) {
  return std::isnan(score) ? -std::numeric_limits<double>::infinity() : score;
}

// Insertion into a sorted list of K: E K comparisons at worst.
void select_rows(const double* scores, std::int64_t num_rows, std::int64_t num_columns, std::int64_t k,
                 std::int32_t* ids) {
  for (std::int64_t row = 0; row < num_rows; ++row, scores += num_columns, ids += k) {
    std::int64_t held = 0;
    for (std::int64_t column = 0; column < num_columns; ++column) {
      const double score = comparable(scores[column]);
      if (held == k && !(score > comparable(scores[ids[k - 1]]))) continue;
      std::int64_t place = held < k ? held++ : k - 1;
      while (place > 0 && score > comparable(scores[ids[place - 1]])) {
        ids[place] = ids[place - 1];
        --place;
      }
      ids[place] = static_cast<std::int32_t>(column);
    }
  }
}

// A score and its column as one integer, larger for a better score and, among equal ones, for a lower column.
// Never 0.
COLLEGIUM_INLINE std::uint64_t sort_key(float score, std::int64_t column) {
  constexpr std::uint32_t kSign = 0x80000000U;
  const float lowest = -std::numeric_limits<float>::infinity();
  const auto bits = std::bit_cast<std::uint32_t>((score == score ? score : lowest) + 0.0F);  // -0 becomes 0
  const std::uint32_t ordered = (bits & kSign) != 0 ? ~bits : bits | kSign;
  return (std::uint64_t{ordered} << 32U) | (0xffffffffU - static_cast<std::uint32_t>(column));
}
COLLEGIUM_INLINE std::int64_t column_of(std::uint64_t key) {
  return static_cast<std::int64_t>(0xffffffffU - static_cast<std::uint32_t>(key));
}

// The largest key, K times: a pass over E keys is E / 8 vector operations. `keys` has room for E rounded up
// to kLanes.
COLLEGIUM_CLONES void select_rows(const float* scores, std::int64_t num_rows, std::int64_t num_columns,
                                  std::int64_t k, std::int32_t* ids, std::uint64_t* __restrict__ keys) {
  for (std::int64_t row = 0; row < num_rows; ++row, scores += num_columns, ids += k) {
    for (std::int64_t column = 0; column < num_columns; ++column)
      keys[column] = sort_key(scores[column], column);
    for (std::int64_t i = 0; i < k; ++i) {
      std::array<std::uint64_t, kLanes> lanes{};
      for (std::int64_t first = 0; first < num_columns; first += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
          auto& best = lanes[static_cast<std::size_t>(lane)];
          best = std::max(best, keys[first + lane]);
        }
      }
      const std::uint64_t best = *std::max_element(lanes.begin(), lanes.end());
      ids[i] = static_cast<std::int32_t>(column_of(best));
      keys[column_of(best)] = 0;
    }
  }
}

void select_rows(const float* scores, std::int64_t num_rows, std::int64_t num_columns, std::int64_t k,
                 std::int32_t* ids) {
  std::vector<std::uint64_t> keys(static_cast<std::size_t>((num_columns + kLanes - 1) / kLanes * kLanes));
  if (k <= kMostPasses) {
    select_rows(scores, num_rows, num_columns, k, ids, keys.data());
    return;
  }
  keys.resize(static_cast<std::size_t>(num_columns));
  for (std::int64_t row = 0; row < num_rows; ++row, scores += num_columns, ids += k) {
    for (std::int64_t column = 0; column < num_columns; ++column)
      keys[static_cast<std::size_t>(column)] = sort_key(scores[column], column);
    std::partial_sort(keys.begin(), keys.begin() + k, keys.end(), std::greater<>());
    for (std::int64_t i = 0; i < k; ++i)
      ids[i] = static_cast<std::int32_t>(column_of(keys[static_cast<std::size_t>(i)]));
  }
}

}  // namespace

at::Tensor topk_stable(const at::Tensor& scores_TE, std::int64_t k) {
  COLLEGIUM_CHECK(scores_TE.dim() == 2 && k >= 1 && k <= scores_TE.size(1),
                  "topk_stable: k = {} of {} columns", k, scores_TE.size(-1));
  if (!scores_TE.is_cpu()) return topk_stable_aten(scores_TE, k);
  const at::Tensor scores = scores_TE.contiguous();
  const std::int64_t num_columns = scores.size(1);
  at::Tensor ids_TK = at::empty({scores.size(0), k}, scores.options().dtype(at::kInt));
  auto* ids = ids_TK.mutable_data_ptr<std::int32_t>();
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "topk_stable", [&] {
    const auto* data = scores.const_data_ptr<scalar_t>();
    at::parallel_for(0, scores.size(0), kSelectRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      select_rows(data + begin * num_columns, end - begin, num_columns, k, ids + begin * k);
    });
  });
  return ids_TK;
}

at::Tensor topk_stable_aten(const at::Tensor& scores_TE, std::int64_t k) {
  const at::Tensor lowest = at::full_like(scores_TE, -std::numeric_limits<double>::infinity());
  const at::Tensor comparable_TE = at::where(at::isnan(scores_TE), lowest, scores_TE);
  const at::Tensor order_TE =
      std::get<1>(at::sort(comparable_TE, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
  return order_TE.narrow(-1, 0, k).to(at::kInt).contiguous();
}

}  // namespace collegium::ops
