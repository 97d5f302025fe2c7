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

at::Tensor rows_of_slots(const at::Tensor& values_TK, const at::Tensor& row_slot_R) {
  return values_TK.reshape({-1}).index_select(0, row_slot_R);
}

at::Tensor slots_of_rows(const at::Tensor& values_R, const at::Tensor& row_slot_R, at::IntArrayRef shape) {
  at::Tensor values_TK = at::zeros(shape, values_R.options());
  values_TK.view({-1}).index_copy_(0, row_slot_R.to(at::kLong), values_R);
  return values_TK;
}

}  // namespace collegium::moe
