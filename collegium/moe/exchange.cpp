// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/exchange.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "collegium/base/error.h"

namespace collegium::moe {

std::int64_t RowCounts::total_send() const {
  return std::accumulate(send.begin(), send.end(), std::int64_t{0});
}
std::int64_t RowCounts::total_recv() const {
  return std::accumulate(recv.begin(), recv.end(), std::int64_t{0});
}

namespace {

at::Tensor empty_rows(const at::Tensor& like, std::int64_t num_rows) {
  std::vector<std::int64_t> shape = like.sizes().vec();
  shape[0] = num_rows;
  return at::empty(shape, like.options());
}

}  // namespace

Exchange start_exchange(comm::Communicator& group, const at::Tensor& rows, const RowCounts& counts) {
  COLLEGIUM_CHECK(rows.size(0) == counts.total_send(), "{} rows, counts sum to {}", rows.size(0),
                  counts.total_send());
  const at::Tensor received = empty_rows(rows, counts.total_recv());
  return {.received = received, .work = group.all_to_all(rows, received, counts.send, counts.recv)};
}

Exchange start_exchange(comm::Communicator& group, const at::Tensor& rows, const comm::RankBlocks& send,
                        const comm::RankBlocks& recv) {
  std::int64_t num_received = 0;
  for (const auto& of_rank : recv.rows) num_received += std::reduce(of_rank.begin(), of_rank.end());
  const at::Tensor received = empty_rows(rows, num_received);
  return {.received = received, .work = group.all_to_all(rows, received, send, recv)};
}

std::vector<std::vector<std::int64_t>> exchange_token_counts(comm::Communicator& group,
                                                             std::span<const at::Tensor> chunk_ids_TK) {
  const auto num_chunks = static_cast<std::int64_t>(chunk_ids_TK.size());
  const at::Tensor own = at::empty({1, num_chunks}, at::kLong);
  auto* count = own.mutable_data_ptr<std::int64_t>();
  for (const at::Tensor& ids_TK : chunk_ids_TK) *count++ = ids_TK.size(0);
  const at::Tensor all = at::empty({group.size(), num_chunks}, at::kLong);
  group.all_gather(own, all).wait();
  const auto* counts = all.const_data_ptr<std::int64_t>();
  std::vector<std::vector<std::int64_t>> tokens(chunk_ids_TK.size());
  for (int rank = 0; rank < group.size(); ++rank) {
    for (auto& of_chunk : tokens) of_chunk.push_back(*counts++);
  }
  return tokens;
}

at::Tensor rows_of_slots(const at::Tensor& values_TK, const at::Tensor& row_slot_R) {
  return values_TK.reshape({-1}).index_select(0, row_slot_R);
}

at::Tensor slots_of_rows(const at::Tensor& values_R, const at::Tensor& row_slot_R, at::IntArrayRef shape) {
  at::Tensor values_TK = at::zeros(shape, values_R.options());
  values_TK.view({-1}).index_copy_(0, row_slot_R.to(at::kLong), values_R);
  return values_TK;
}

}  // namespace collegium::moe
