// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows grouped by expert, and back. Both directions are gathers: every output row is written once, by one
// thread, so the results do not depend on threads, and nothing is added atomically.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::ops {

/// Where every (token, slot) goes. R = number of slots with an expert.
struct Permutation {
  at::Tensor row_token_R;  ///< int32: token of each row
  at::Tensor row_slot_R;   ///< int32: t K + k of each row
  at::Tensor slot_row_TK;  ///< int32: row of each slot, -1 = none
  at::Tensor counts_E;     ///< int64 on the CPU: rows per expert
};

/// What     A counting sort of the slots by expert; within an expert in (token, slot) order.
/// Shape    expert_ids_TK int32 [T, K], -1 = no expert; ids < num_experts.
Permutation group_by_expert(const at::Tensor& expert_ids_TK, std::int64_t num_experts);
/// The same with ATen operators only, for any device.
Permutation group_by_expert_aten(const at::Tensor& expert_ids_TK, std::int64_t num_experts);

/// What     rows[r] = x[row_token[r]], zeros for the token -1: dispatch forward, and combine backward.
/// Shape    x_TD [T, D], row_token_R int32 [R] -> [R, D], any floating dtype.
at::Tensor gather_rows(const at::Tensor& x_TD, const at::Tensor& row_token_R);
at::Tensor gather_rows_aten(const at::Tensor& x_TD, const at::Tensor& row_token_R);
/// The same on the CPU, from contiguous rows into contiguous memory, of x's dtype or fp32 for bf16.
void gather_rows_into(const at::Tensor& x_TD, const at::Tensor& row_token_R, const at::Tensor& rows_RD);
/// The same to rows of a larger tensor of x's dtype: row r becomes rows_XD[row_place[r]].
/// Shape    row_place_R int32 [R], each place at most once.
void gather_rows_into(const at::Tensor& x_TD, const at::Tensor& row_token_R, const at::Tensor& row_place_R,
                      const at::Tensor& rows_XD);

/// What     y[t] = sum over k of rows[slot_row[t, k]], in slot order; slots without a row add nothing.
///          Combine forward, and dispatch backward.
/// Dtype    any floating dtype; the sum is kept in fp32 (fp64 for fp64) and rounded once.
at::Tensor combine_rows(const at::Tensor& rows_RD, const at::Tensor& slot_row_TK);
at::Tensor combine_rows_aten(const at::Tensor& rows_RD, const at::Tensor& slot_row_TK);
/// The same of rows that lie in two places: those after rows_RD are the rows of more_XD, in order.
at::Tensor combine_rows(const at::Tensor& rows_RD, const at::Tensor& more_XD, const at::Tensor& slot_row_TK);

}  // namespace collegium::ops
