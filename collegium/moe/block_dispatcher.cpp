// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/block_dispatcher.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/moe/exchange.h"

namespace collegium::moe {

namespace {

std::shared_ptr<BlockHandle> of_blocks(const std::shared_ptr<DispatchHandle>& handle) {
  return std::static_pointer_cast<BlockHandle>(handle);
}

at::Tensor travelling_weights(const at::Tensor& weights_TK, const BlockHandle& h) {
  const at::Tensor weights_R = rows_of_slots(weights_TK, h.permutation.row_slot_R);
  if (!h.place_R.defined()) return weights_R;
  return at::zeros({h.sent_token_X.size(0) + h.own_token_Y.size(0)}, weights_R.options())
      .index_copy_(0, h.place_R, weights_R);
}

at::Tensor weights_of_slots(const at::Tensor& weights_X, const BlockHandle& h) {
  const at::Tensor weights_R = h.place_R.defined() ? weights_X.index_select(0, h.place_R) : weights_X;
  return slots_of_rows(weights_R, h.permutation.row_slot_R, h.slot_source_TK.sizes());
}

Exchange send_rows(comm::Communicator& group, const at::Tensor& values_TD, const BlockHandle& h) {
  return start_exchange(group, ops::gather_rows(values_TD, h.sent_token_X), h.sent_by_rank,
                        h.received_by_expert);
}

// Of ranks [first, end).
std::int64_t num_rows(const comm::RankBlocks& blocks, std::size_t first, std::size_t end) {
  std::int64_t sum = 0;
  for (std::size_t rank = first; rank < end; ++rank)
    sum += std::reduce(blocks.rows[rank].begin(), blocks.rows[rank].end());
  return sum;
}

}  // namespace

std::vector<std::shared_ptr<BlockHandle>> BlockDispatcher::start_plan(const DispatchRequest& request) const {
  std::vector<std::shared_ptr<BlockHandle>> handles;
  for (const at::Tensor& ids_TK : request.chunk_ids_TK) {
    auto handle = std::make_shared<BlockHandle>();
    handle->where = request.where;
    handle->permutation = ops::group_by_expert(ids_TK, placement_.num_experts);
    handle->row_token_X = handle->permutation.row_token_R;
    handle->slot_row_TK = handle->permutation.slot_row_TK;
    handle->by_expert.block_major = true;
    handles.push_back(std::move(handle));
  }
  return handles;
}

void BlockDispatcher::finish_plan(BlockHandle& h) const {
  const auto self = static_cast<std::size_t>(ep_->rank());
  const std::int64_t own_begin = num_rows(h.by_rank, 0, self);
  const std::int64_t num_own = num_rows(h.by_rank, self, self + 1);
  const std::int64_t own_end = own_begin + num_own;
  const std::int64_t num_here = num_rows(h.by_expert, 0, h.by_expert.rows.size());
  const std::int64_t num_all = h.row_token_X.size(0);
  COLLEGIUM_CHECK(num_here + num_all - num_own <= std::numeric_limits<std::int32_t>::max(),
                  "{} rows of experts and {} that come back are too many", num_here, num_all - num_own);
  h.sent_token_X =
      at::cat({h.row_token_X.narrow(0, 0, own_begin), h.row_token_X.narrow(0, own_end, num_all - own_end)});
  h.own_token_Y = h.row_token_X.narrow(0, own_begin, num_own).clone();
  h.own_place_Y = at::empty({num_own}, at::kInt);
  auto* places = h.own_place_Y.mutable_data_ptr<std::int32_t>();
  auto* next = places;
  const std::vector<std::vector<comm::Piece>> pieces = comm::lay_out(h.by_expert);
  for (const comm::Piece& piece : pieces[self]) {
    std::iota(next, next + piece.rows, static_cast<std::int32_t>(piece.begin));
    next += piece.rows;
  }
  h.slot_source_TK = at::empty_like(h.slot_row_TK);
  const auto* slot_row = h.slot_row_TK.const_data_ptr<std::int32_t>();
  const auto source = [&](std::int32_t row) {
    if (row < 0) return -1;
    if (row < own_begin) return static_cast<std::int32_t>(num_here + row);
    if (row < own_end) return places[row - own_begin];
    return static_cast<std::int32_t>(num_here + row - num_own);
  };
  std::transform(slot_row, slot_row + h.slot_row_TK.numel(),
                 h.slot_source_TK.mutable_data_ptr<std::int32_t>(), source);
  h.sent_by_rank = h.by_rank;
  h.sent_by_rank.rows[self].clear();
  h.received_by_expert = h.by_expert;
  h.sent_by_rank.stays = h.received_by_expert.stays = ep_->rank();
  // What no arrow reads.
  h.row_token_X = h.slot_row_TK = h.permutation.row_token_R = h.permutation.slot_row_TK = at::Tensor();
}

Pending<DispatchedRows> BlockDispatcher::dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                                  const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch"));
  const at::Tensor x = x_TD.contiguous();
  Exchange rows = send_rows(*ep_, x, *h);
  Exchange weights = start_exchange(*ep_, travelling_weights(weights_TK, *h), h->by_rank, h->by_expert);
  ops::gather_rows_into(x, h->own_token_Y, h->own_place_Y, rows.received);
  return Pending<DispatchedRows>([h, rows, weights]() mutable -> DispatchedRows {
    rows.work.wait();
    weights.work.wait();
    return {.rows = rows.received, .weights_R = weights.received};
  });
}

Pending<at::Tensor> BlockDispatcher::combine(const at::Tensor& rows_RD,
                                             const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine"));
  Exchange rows = start_exchange(*ep_, rows_RD, h->received_by_expert, h->sent_by_rank);
  return Pending<at::Tensor>([h, rows_RD, rows]() mutable {
    rows.work.wait();
    return ops::combine_rows(rows_RD, rows.received, h->slot_source_TK);
  });
}

Pending<ops::RowSource> BlockDispatcher::combine_backward(const at::Tensor& grad_y_TD,
                                                          const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine backward"));
  const at::Tensor grad_y = grad_y_TD.contiguous();
  Exchange rows = send_rows(*ep_, grad_y, *h);
  ops::gather_rows_into(grad_y, h->own_token_Y, h->own_place_Y, rows.received);
  return Pending<ops::RowSource>([h, rows]() mutable -> ops::RowSource {
    rows.work.wait();
    return rows.received;
  });
}

Pending<DispatchGradients> BlockDispatcher::dispatch_backward(const at::Tensor& grad_rows_RD,
                                                              const at::Tensor& grad_weights_R,
                                                              const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch backward"));
  Exchange rows;
  if (grad_rows_RD.defined())
    rows = start_exchange(*ep_, grad_rows_RD, h->received_by_expert, h->sent_by_rank);
  Exchange weights = start_exchange(*ep_, grad_weights_R, h->by_expert, h->by_rank);
  return Pending<DispatchGradients>([h, grad_rows_RD, rows, weights]() mutable {
    rows.work.wait();
    weights.work.wait();
    DispatchGradients gradients{.x_TD = {}, .weights_TK = weights_of_slots(weights.received, *h)};
    if (grad_rows_RD.defined())
      gradients.x_TD = ops::combine_rows(grad_rows_RD, rows.received, h->slot_source_TK);
    return gradients;
  });
}

}  // namespace collegium::moe
