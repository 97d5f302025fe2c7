// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/permute.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

// A row of 512 bf16 values is 1 KiB: 32 of them are worth a task.
constexpr std::int64_t kGatherRowsPerTask = 32;

}  // namespace

Permutation group_by_expert(const at::Tensor& expert_ids_TK, std::int64_t num_experts) {
  COLLEGIUM_CHECK(expert_ids_TK.dim() == 2 && expert_ids_TK.scalar_type() == at::kInt,
                  "ids must be int32 [T, K]");
  COLLEGIUM_CHECK(expert_ids_TK.numel() <= std::numeric_limits<std::int32_t>::max(),
                  "{} slots: more than int32 can count", expert_ids_TK.numel());
  if (!expert_ids_TK.is_cpu()) return group_by_expert_aten(expert_ids_TK, num_experts);
  const at::Tensor ids_TK = expert_ids_TK.contiguous();
  const auto* ids = ids_TK.const_data_ptr<std::int32_t>();
  const std::int64_t num_slots = ids_TK.numel();
  const std::int64_t top_k = ids_TK.size(1);

  at::Tensor counts_E = at::zeros({num_experts}, at::kLong);
  auto* counts = counts_E.mutable_data_ptr<std::int64_t>();
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    COLLEGIUM_CHECK(ids[slot] < num_experts, "expert id {} of {} experts", ids[slot], num_experts);
    if (ids[slot] >= 0) ++counts[ids[slot]];
  }
  std::vector<std::int64_t> next(static_cast<std::size_t>(num_experts));
  std::int64_t num_rows = 0;
  for (std::int64_t expert = 0; expert < num_experts; ++expert) {
    next[static_cast<std::size_t>(expert)] = num_rows;
    num_rows += counts[expert];
  }

  Permutation permutation{.row_token_R = at::empty({num_rows}, at::kInt),
                          .row_slot_R = at::empty({num_rows}, at::kInt),
                          .slot_row_TK = at::empty_like(ids_TK),
                          .counts_E = counts_E};
  auto* row_token = permutation.row_token_R.mutable_data_ptr<std::int32_t>();
  auto* row_slot = permutation.row_slot_R.mutable_data_ptr<std::int32_t>();
  auto* slot_row = permutation.slot_row_TK.mutable_data_ptr<std::int32_t>();
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    if (ids[slot] < 0) {
      slot_row[slot] = -1;
      continue;
    }
    const std::int64_t row = next[static_cast<std::size_t>(ids[slot])]++;
    slot_row[slot] = static_cast<std::int32_t>(row);
    row_slot[row] = static_cast<std::int32_t>(slot);
    row_token[row] = static_cast<std::int32_t>(slot / top_k);
  }
  return permutation;
}

Permutation group_by_expert_aten(const at::Tensor& expert_ids_TK, std::int64_t num_experts) {
  const at::Tensor ids_N = expert_ids_TK.reshape({-1});
  const at::Tensor kept_R = at::nonzero(ids_N >= 0).reshape({-1});
  const at::Tensor kept_ids_R = ids_N.index_select(0, kept_R).to(at::kLong);
  const at::Tensor order_R =
      std::get<1>(at::sort(kept_ids_R, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  const at::Tensor row_slot_R = kept_R.index_select(0, order_R);
  const at::Tensor rows_R = at::arange(row_slot_R.numel(), row_slot_R.options().dtype(at::kInt));
  at::Tensor slot_row_N = at::full({ids_N.numel()}, -1, ids_N.options());
  slot_row_N.index_copy_(0, row_slot_R, rows_R);
  return {.row_token_R = row_slot_R.floor_divide(expert_ids_TK.size(1)).to(at::kInt),
          .row_slot_R = row_slot_R.to(at::kInt),
          .slot_row_TK = slot_row_N.view_as(expert_ids_TK),
          .counts_E = at::bincount(kept_ids_R, {}, num_experts).cpu()};
}

at::Tensor gather_rows(const at::Tensor& x_TD, const at::Tensor& row_token_R) {
  if (!x_TD.is_cpu()) return gather_rows_aten(x_TD, row_token_R);
  at::Tensor rows_RD = at::empty({row_token_R.numel(), x_TD.size(1)}, x_TD.options());
  gather_rows_into(x_TD.contiguous(), row_token_R, rows_RD);
  return rows_RD;
}

namespace {

COLLEGIUM_CLONES void widen_row(const c10::BFloat16* from, std::int64_t count, float* __restrict__ to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = row_math::widen(from[i]);
}

// Row r to the r-th row, or to that of its place.
void gather_bytes(const at::Tensor& x_TD, const at::Tensor& row_token_R, const std::int32_t* places,
                  const at::Tensor& rows_XD) {
  const auto row_bytes = static_cast<std::size_t>(x_TD.size(1)) * x_TD.element_size();
  if (row_bytes == 0) return;
  const auto* tokens = row_token_R.const_data_ptr<std::int32_t>();
  const auto* source = static_cast<const char*>(x_TD.const_data_ptr());
  auto* target = static_cast<char*>(rows_XD.mutable_data_ptr());
  at::parallel_for(0, row_token_R.numel(), kGatherRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      char* to = target + static_cast<std::size_t>(places == nullptr ? row : places[row]) * row_bytes;
      if (tokens[row] < 0) {
        std::memset(to, 0, row_bytes);
      } else {
        std::memcpy(to, source + static_cast<std::size_t>(tokens[row]) * row_bytes, row_bytes);
      }
    }
  });
}

void gather_widened(const at::Tensor& x_TD, const at::Tensor& row_token_R, const at::Tensor& rows_RD) {
  COLLEGIUM_CHECK(x_TD.scalar_type() == at::kBFloat16 && rows_RD.scalar_type() == at::kFloat,
                  "rows of {} gathered as {}", c10::toString(x_TD.scalar_type()),
                  c10::toString(rows_RD.scalar_type()));
  const std::int64_t width = x_TD.size(1);
  const auto* tokens = row_token_R.const_data_ptr<std::int32_t>();
  const auto* source = x_TD.const_data_ptr<c10::BFloat16>();
  auto* target = rows_RD.mutable_data_ptr<float>();
  at::parallel_for(0, row_token_R.numel(), kGatherRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      if (tokens[row] < 0) {
        std::fill_n(target + row * width, width, 0.0F);
      } else {
        widen_row(source + tokens[row] * width, width, target + row * width);
      }
    }
  });
}

}  // namespace

void gather_rows_into(const at::Tensor& x_TD, const at::Tensor& row_token_R, const at::Tensor& rows_RD) {
  if (rows_RD.scalar_type() != x_TD.scalar_type()) {
    gather_widened(x_TD, row_token_R, rows_RD);
    return;
  }
  gather_bytes(x_TD, row_token_R, nullptr, rows_RD);
}

void gather_rows_into(const at::Tensor& x_TD, const at::Tensor& row_token_R, const at::Tensor& row_place_R,
                      const at::Tensor& rows_XD) {
  COLLEGIUM_CHECK(rows_XD.scalar_type() == x_TD.scalar_type() && row_place_R.numel() == row_token_R.numel(),
                  "{} rows of {} gathered to {} places of {}", row_token_R.numel(),
                  c10::toString(x_TD.scalar_type()), row_place_R.numel(),
                  c10::toString(rows_XD.scalar_type()));
  gather_bytes(x_TD, row_token_R, row_place_R.const_data_ptr<std::int32_t>(), rows_XD);
}

at::Tensor gather_rows_aten(const at::Tensor& x_TD, const at::Tensor& row_token_R) {
  const at::Tensor index_R = row_token_R.to(at::kLong);
  const at::Tensor none_R1 = (index_R < 0).unsqueeze(1);
  if (x_TD.size(0) == 0) return at::zeros({index_R.numel(), x_TD.size(1)}, x_TD.options());
  return x_TD.index_select(0, index_R.clamp_min(0)).masked_fill_(none_R1, 0.0);
}

namespace {

using row_math::narrow;
using row_math::Wide;
using row_math::widen;

// Elements of a token summed at a time, whose sums stay in the first cache.
constexpr std::int64_t kColumnsPerPass = 512;
// Rows added in one pass over the sums. They come from memory: one at a time at two thirds of the rate of
// four, which is that of reading alone.
constexpr std::int64_t kRowsPerPass = 4;

template <typename T>
struct CombineTokens {
  const T* rows;
  const T* more;          // rows from num_rows on
  std::int64_t num_rows;  // before them
  const std::int32_t* slot_rows;
  std::int64_t tokens;
  std::int64_t top_k;
  std::int64_t width;
  T* y;
};

template <typename T>
using RowGroup = std::array<const T*, kRowsPerPass>;

// The first `count` rows, at most kRows, in their order.
template <std::int64_t kRows, typename T>
COLLEGIUM_INLINE void add_rows(const RowGroup<T>& rows, std::int64_t count, std::int64_t columns,
                               Wide<T>* __restrict__ sums) {
  if constexpr (kRows > 0) {
    if (count < kRows) return add_rows<kRows - 1, T>(rows, count, columns, sums);
    for (std::int64_t d = 0; d < columns; ++d) {
      Wide<T> sum = sums[d];
      for (std::int64_t r = 0; r < kRows; ++r) sum += widen(rows[static_cast<std::size_t>(r)][d]);
      sums[d] = sum;
    }
  }
}

// Columns from `first` on of a token's rows.
template <typename T>
COLLEGIUM_INLINE void add_token(const CombineTokens<T>& o, std::int64_t first, std::int64_t columns,
                                Wide<T>* __restrict__ sums) {
  RowGroup<T> group{};
  std::int64_t held = 0;
  for (std::int64_t k = 0; k < o.top_k; ++k) {
    const std::int64_t index = o.slot_rows[k];
    if (index < 0) continue;
    group[static_cast<std::size_t>(held++)] =
        (index < o.num_rows ? o.rows + index * o.width : o.more + (index - o.num_rows) * o.width) + first;
    if (held < kRowsPerPass) continue;
    add_rows<kRowsPerPass, T>(group, held, columns, sums);
    held = 0;
  }
  add_rows<kRowsPerPass, T>(group, held, columns, sums);
}

template <typename T>
COLLEGIUM_INLINE void combine_tokens(CombineTokens<T> o) {
  std::array<Wide<T>, kColumnsPerPass> sums;
  for (std::int64_t token = 0; token < o.tokens; ++token, o.slot_rows += o.top_k, o.y += o.width) {
    for (std::int64_t first = 0; first < o.width; first += kColumnsPerPass) {
      const std::int64_t columns = std::min(kColumnsPerPass, o.width - first);
      sums.fill(0);
      add_token(o, first, columns, sums.data());
      for (std::int64_t d = 0; d < columns; ++d)
        o.y[first + d] = narrow<T>(sums[static_cast<std::size_t>(d)]);
    }
  }
}
COLLEGIUM_CLONES void combine(const CombineTokens<double>& o) { combine_tokens(o); }
COLLEGIUM_CLONES void combine(const CombineTokens<float>& o) { combine_tokens(o); }
COLLEGIUM_CLONES void combine(const CombineTokens<c10::BFloat16>& o) { combine_tokens(o); }

}  // namespace

at::Tensor combine_rows(const at::Tensor& rows_RD, const at::Tensor& slot_row_TK) {
  if (!rows_RD.is_cpu()) return combine_rows_aten(rows_RD, slot_row_TK);
  return combine_rows(rows_RD, rows_RD.narrow(0, 0, 0), slot_row_TK);
}

at::Tensor combine_rows(const at::Tensor& rows_RD, const at::Tensor& more_XD, const at::Tensor& slot_row_TK) {
  COLLEGIUM_CHECK(more_XD.scalar_type() == rows_RD.scalar_type() && more_XD.size(1) == rows_RD.size(1),
                  "rows of {} {} and of {} {} values combined", rows_RD.size(1),
                  c10::toString(rows_RD.scalar_type()), more_XD.size(1),
                  c10::toString(more_XD.scalar_type()));
  if (!rows_RD.is_cpu()) return combine_rows_aten(at::cat({rows_RD, more_XD}), slot_row_TK);
  const at::Tensor rows = rows_RD.contiguous();
  const at::Tensor more = more_XD.contiguous();
  const at::Tensor slots = slot_row_TK.contiguous();
  const std::int64_t width = rows.size(1);
  const std::int64_t top_k = slots.size(1);
  at::Tensor y_TD = at::empty({slots.size(0), width}, rows.options());
  const auto* slot_rows = slots.const_data_ptr<std::int32_t>();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, rows.scalar_type(), "combine_rows", [&] {
    const auto* source = rows.const_data_ptr<scalar_t>();
    auto* target = y_TD.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, slots.size(0), kGatherRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      combine(CombineTokens<scalar_t>{.rows = source,
                                      .more = more.const_data_ptr<scalar_t>(),
                                      .num_rows = rows.size(0),
                                      .slot_rows = slot_rows + begin * top_k,
                                      .tokens = end - begin,
                                      .top_k = top_k,
                                      .width = width,
                                      .y = target + begin * width});
    });
  });
  return y_TD;
}

at::Tensor combine_rows_aten(const at::Tensor& rows_RD, const at::Tensor& slot_row_TK) {
  const auto wide = at::toOpMathType(rows_RD.scalar_type());
  // Row R is zero: what a slot without a row points to.
  const at::Tensor padded = at::cat({rows_RD, at::zeros({1, rows_RD.size(1)}, rows_RD.options())});
  const at::Tensor index_TK = slot_row_TK.to(at::kLong);
  const at::Tensor safe_TK = index_TK.masked_fill(index_TK < 0, rows_RD.size(0));
  at::Tensor sum = at::zeros({slot_row_TK.size(0), rows_RD.size(1)}, rows_RD.options().dtype(wide));
  for (std::int64_t k = 0; k < slot_row_TK.size(1); ++k)
    sum.add_(padded.index_select(0, safe_TK.select(1, k)));
  return sum.to(rows_RD.scalar_type());
}

}  // namespace collegium::ops
