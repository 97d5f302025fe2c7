// SPDX-License-Identifier: Apache-2.0

// Exactly the routed rows travel: counts are exchanged, then one all_to_all per arrow.
//
//   rows of this rank, by expert:  e0 e0 e1 | e2 e3 e3      | = between the experts of rank 0 and of rank 1
//   received, by expert:           e0 e0 e0 | e1 e1 e1      (by expert, then source rank, token, slot)
//
// The all_to_all itself puts the blocks in order: no row is copied for that.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <functional>

#include "collegium/base/error.h"
#include "collegium/moe/dispatcher.h"
#include "collegium/moe/exchange.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

using comm::Communicator;

struct UnevenHandle final : DispatchHandle {
  ops::Permutation permutation;  ///< slots of this rank by expert, so by destination rank
  comm::RankBlocks by_rank;      ///< rows of this rank's tokens for each expert of each rank
  comm::RankBlocks by_expert;    ///< rows for each expert of this rank from each rank
};

class UnevenDispatcher final : public Dispatcher {
 public:
  UnevenDispatcher(const ExpertPlacement& placement, std::shared_ptr<Communicator> ep)
      : placement_(placement), ep_(std::move(ep)) {}

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    const comm::WhereScope scope(ep_->where(), at_phase(request.where, "plan"));
    std::vector<std::shared_ptr<UnevenHandle>> handles;
    for (const at::Tensor& ids_TK : request.chunk_ids_TK) {
      auto handle = std::make_shared<UnevenHandle>();
      handle->where = request.where;
      handle->permutation = ops::group_by_expert(ids_TK, placement_.num_experts);
      handles.push_back(std::move(handle));
    }
    exchange_counts(handles);
    return {handles.begin(), handles.end()};
  }

  Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<UnevenHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch"));
    Exchange rows =
        start_exchange(*ep_, ops::gather_rows(x_TD, h->permutation.row_token_R), h->by_rank, h->by_expert);
    Exchange weights =
        start_exchange(*ep_, rows_of_slots(weights_TK, h->permutation.row_slot_R), h->by_rank, h->by_expert);
    return Pending<DispatchedRows>([h, rows, weights]() mutable -> DispatchedRows {
      rows.work.wait();
      weights.work.wait();
      return {.rows = {.values_XD = rows.received, .index_R = {}}, .weights_R = weights.received};
    });
  }

  Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                              const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<UnevenHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine"));
    Exchange rows = start_exchange(*ep_, rows_RD, h->by_expert, h->by_rank);
    return Pending<at::Tensor>([h, rows]() mutable {
      rows.work.wait();
      return ops::combine_rows(rows.received, h->permutation.slot_row_TK);
    });
  }

  Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                           const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<UnevenHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine backward"));
    Exchange rows = start_exchange(*ep_, ops::gather_rows(grad_y_TD, h->permutation.row_token_R), h->by_rank,
                                   h->by_expert);
    return Pending<ops::RowSource>([h, rows]() mutable -> ops::RowSource {
      rows.work.wait();
      return {.values_XD = rows.received, .index_R = {}};
    });
  }

  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<UnevenHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch backward"));
    Exchange rows;
    if (grad_rows_RD.defined()) rows = start_exchange(*ep_, grad_rows_RD, h->by_expert, h->by_rank);
    Exchange weights = start_exchange(*ep_, grad_weights_R, h->by_expert, h->by_rank);
    return Pending<DispatchGradients>([h, rows, weights]() mutable {
      rows.work.wait();
      weights.work.wait();
      const at::Tensor& slot_row_TK = h->permutation.slot_row_TK;
      DispatchGradients gradients{
          .x_TD = {},
          .weights_TK = slots_of_rows(weights.received, h->permutation.row_slot_R, slot_row_TK.sizes())};
      if (rows.received.defined()) gradients.x_TD = ops::combine_rows(rows.received, slot_row_TK);
      return gradients;
    });
  }

 private:
  // Every rank learns how many rows each rank has for each of its experts, of all chunks at once.
  void exchange_counts(const std::vector<std::shared_ptr<UnevenHandle>>& handles) const {
    const auto num_chunks = static_cast<std::int64_t>(handles.size());
    const std::int64_t num_local = placement_.count(ep_->rank());
    RowCounts counts;
    const at::Tensor outgoing = at::empty({num_chunks * placement_.num_experts}, at::kLong);
    auto* next = outgoing.mutable_data_ptr<std::int64_t>();
    for (int rank = 0; rank < ep_->size(); ++rank) {
      counts.send.push_back(num_chunks * placement_.count(rank));
      counts.recv.push_back(num_chunks * num_local);
      for (const auto& handle : handles) {
        const auto* counts_E = handle->permutation.counts_E.const_data_ptr<std::int64_t>();
        handle->by_rank.rows.emplace_back(counts_E + placement_.first(rank),
                                          counts_E + placement_.first(rank + 1));
        next = std::copy(handle->by_rank.rows.back().begin(), handle->by_rank.rows.back().end(), next);
      }
    }
    Exchange exchange = start_exchange(*ep_, outgoing, counts);
    exchange.work.wait();
    const auto* incoming = exchange.received.const_data_ptr<std::int64_t>();
    for (int rank = 0; rank < ep_->size(); ++rank) {
      for (const auto& handle : handles) {
        handle->by_expert.rows.emplace_back(incoming, incoming + num_local);
        incoming += num_local;
      }
    }
    for (const auto& handle : handles) {
      handle->by_expert.block_major = true;
      handle->row_counts_L = at::zeros({num_local}, at::kLong);
      auto* totals = handle->row_counts_L.mutable_data_ptr<std::int64_t>();
      for (const std::vector<std::int64_t>& rows_L : handle->by_expert.rows)
        std::transform(rows_L.begin(), rows_L.end(), totals, totals, std::plus<>());
    }
  }

  ExpertPlacement placement_;
  std::shared_ptr<Communicator> ep_;
};

}  // namespace

std::shared_ptr<Dispatcher> make_uneven_dispatcher(const ExpertPlacement& placement,
                                                   std::shared_ptr<Communicator> ep) {
  return std::make_shared<UnevenDispatcher>(placement, std::move(ep));
}

}  // namespace collegium::moe
