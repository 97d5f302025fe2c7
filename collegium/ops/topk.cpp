// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/topk.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>

#include <cmath>
#include <limits>

#include "collegium/base/error.h"

namespace collegium::ops {

namespace {

// Rows per task: long enough to pay for waking a thread (one row costs about E K comparisons, some 100 ns).
constexpr std::int64_t kRowsPerTask = 128;

template <typename T>
T comparable(T score) {
  return std::isnan(score) ? -std::numeric_limits<T>::infinity() : score;
}

// Insertion into a sorted list of K: E K comparisons at worst, and faster than a heap for the K <= 16 of MoE
// models.
template <typename T>
void select_row(const T* scores, std::int64_t num_columns, std::int64_t k, std::int32_t* ids) {
  std::int64_t held = 0;
  for (std::int64_t column = 0; column < num_columns; ++column) {
    const T score = comparable(scores[column]);
    if (held == k && !(score > comparable(scores[ids[k - 1]]))) continue;
    std::int64_t place = held < k ? held++ : k - 1;
    while (place > 0 && score > comparable(scores[ids[place - 1]])) {
      ids[place] = ids[place - 1];
      --place;
    }
    ids[place] = static_cast<std::int32_t>(column);
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
    at::parallel_for(0, scores.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row)
        select_row(data + row * num_columns, num_columns, k, ids + row * k);
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
