// SPDX-License-Identifier: Apache-2.0
#pragma once

// Rows to the ranks of a group and back, in the two orders that dispatchers use: by rank (what travels) and
// by block (what an expert computes on).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "collegium/comm/communicator.h"

namespace collegium::moe {

/// How many rows go where in one exchange. Rows lie by rank on both sides.
struct RowCounts {
  std::vector<std::int64_t> send;  ///< to each rank
  std::vector<std::int64_t> recv;  ///< from each rank

  std::int64_t total_send() const;
  std::int64_t total_recv() const;
  /// The way back.
  RowCounts reversed() const { return {.send = recv, .recv = send}; }
};

/// Rows under way and the buffer that they arrive in.
struct Exchange {
  at::Tensor received;
  comm::Work work;
};

/// What     Starts sending rows.
/// Shape    rows [sum of send, ...] -> received [sum of recv, ...].
/// Dtype    any.
Exchange start_exchange(comm::Communicator& group, const at::Tensor& rows, const RowCounts& counts);
/// What     The same in blocks, which may lie in another order on either side.
/// Shape    as above.
/// Dtype    any.
Exchange start_exchange(comm::Communicator& group, const at::Tensor& rows, const comm::RankBlocks& send,
                        const comm::RankBlocks& recv);

/// What     Numbers of tokens of every rank, of all chunks at once.
/// Shape    chunk_ids_TK [T, K] of this rank's chunks -> [chunk][rank].
/// Comm     an all_gather of an integer per chunk; waits for the group.
std::vector<std::vector<std::int64_t>> exchange_token_counts(comm::Communicator& group,
                                                             std::span<const at::Tensor> chunk_ids_TK);

/// What     values_R[r] = values_TK[slot of row r]: the weights that travel with their rows.
/// Shape    values_TK [T, K], row_slot_R int32 or int64 [R], t K + k -> [R].
/// Dtype    any.
at::Tensor rows_of_slots(const at::Tensor& values_TK, const at::Tensor& row_slot_R);

/// What     The reverse: every row's value at its slot, zero at slots without a row.
/// Shape    values_R [R], row_slot_R [R], each slot at most once -> `shape`, [T, K].
/// Dtype    any.
at::Tensor slots_of_rows(const at::Tensor& values_R, const at::Tensor& row_slot_R, at::IntArrayRef shape);

/// What     The same place with the name of an arrow ("dispatch", "combine", "combine backward",
///          "dispatch backward") or "plan".
inline comm::Where at_phase(comm::Where where, std::string phase) {
  where.phase = std::move(phase);
  return where;
}

}  // namespace collegium::moe
