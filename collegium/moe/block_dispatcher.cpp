// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/block_dispatcher.h"

#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include "collegium/moe/exchange.h"

namespace collegium::moe {

namespace {

std::shared_ptr<BlockHandle> of_blocks(const std::shared_ptr<DispatchHandle>& handle) {
  return std::static_pointer_cast<BlockHandle>(handle);
}

// A sum over one slot is a gather that gives zeros where there is no token.
at::Tensor travelling_rows(const at::Tensor& x_TD, const BlockHandle& h) {
  return h.place_R.defined() ? ops::combine_rows(x_TD, h.row_token_X1)
                             : ops::gather_rows(x_TD, h.permutation.row_token_R);
}

at::Tensor travelling_weights(const at::Tensor& weights_TK, const BlockHandle& h) {
  const at::Tensor weights_R = rows_of_slots(weights_TK, h.permutation.row_slot_R);
  if (!h.place_R.defined()) return weights_R;
  return at::zeros({h.row_token_X1.size(0)}, weights_R.options()).index_copy_(0, h.place_R, weights_R);
}

at::Tensor weights_of_slots(const at::Tensor& weights_X, const BlockHandle& h) {
  const at::Tensor weights_R = h.place_R.defined() ? weights_X.index_select(0, h.place_R) : weights_X;
  return slots_of_rows(weights_R, h.permutation.row_slot_R, h.slot_row_TK.sizes());
}

}  // namespace

std::vector<std::shared_ptr<BlockHandle>> BlockDispatcher::start_plan(const DispatchRequest& request) const {
  std::vector<std::shared_ptr<BlockHandle>> handles;
  for (const at::Tensor& ids_TK : request.chunk_ids_TK) {
    auto handle = std::make_shared<BlockHandle>();
    handle->where = request.where;
    handle->permutation = ops::group_by_expert(ids_TK, placement_.num_experts);
    handle->slot_row_TK = handle->permutation.slot_row_TK;
    handle->by_expert.block_major = true;
    handles.push_back(std::move(handle));
  }
  return handles;
}

Pending<DispatchedRows> BlockDispatcher::dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                                  const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch"));
  Exchange rows = start_exchange(*ep_, travelling_rows(x_TD, *h), h->by_rank, h->by_expert);
  Exchange weights = start_exchange(*ep_, travelling_weights(weights_TK, *h), h->by_rank, h->by_expert);
  return Pending<DispatchedRows>([h, rows, weights]() mutable -> DispatchedRows {
    rows.work.wait();
    weights.work.wait();
    return {.rows = {.values_XD = rows.received, .index_R = {}}, .weights_R = weights.received};
  });
}

Pending<at::Tensor> BlockDispatcher::combine(const at::Tensor& rows_RD,
                                             const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine"));
  Exchange rows = start_exchange(*ep_, rows_RD, h->by_expert, h->by_rank);
  return Pending<at::Tensor>([h, rows]() mutable {
    rows.work.wait();
    return ops::combine_rows(rows.received, h->slot_row_TK);
  });
}

Pending<ops::RowSource> BlockDispatcher::combine_backward(const at::Tensor& grad_y_TD,
                                                          const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine backward"));
  Exchange rows = start_exchange(*ep_, travelling_rows(grad_y_TD, *h), h->by_rank, h->by_expert);
  return Pending<ops::RowSource>([h, rows]() mutable -> ops::RowSource {
    rows.work.wait();
    return {.values_XD = rows.received, .index_R = {}};
  });
}

Pending<DispatchGradients> BlockDispatcher::dispatch_backward(const at::Tensor& grad_rows_RD,
                                                              const at::Tensor& grad_weights_R,
                                                              const std::shared_ptr<DispatchHandle>& handle) {
  const auto h = of_blocks(handle);
  const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch backward"));
  Exchange rows;
  if (grad_rows_RD.defined()) rows = start_exchange(*ep_, grad_rows_RD, h->by_expert, h->by_rank);
  Exchange weights = start_exchange(*ep_, grad_weights_R, h->by_expert, h->by_rank);
  return Pending<DispatchGradients>([h, rows, weights]() mutable {
    rows.work.wait();
    weights.work.wait();
    DispatchGradients gradients{.x_TD = {}, .weights_TK = weights_of_slots(weights.received, *h)};
    if (rows.received.defined()) gradients.x_TD = ops::combine_rows(rows.received, h->slot_row_TK);
    return gradients;
  });
}

}  // namespace collegium::moe
