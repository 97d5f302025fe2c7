// SPDX-License-Identifier: Apache-2.0

// Exactly the routed rows travel: counts are exchanged, then one all_to_all per arrow.
//
//   rows of this rank, by expert:  e0 e0 e1 | e2 e3 e3      | = between the experts of rank 0 and of rank 1
//   received, by rank:             (from 0) e0 e0 e1, (from 1) e0 e1 e1
//   what the experts see:          e0 e0 e0 | e1 e1 e1      (by expert, then source rank, token, slot)

#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/moe/dispatcher.h"
#include "collegium/moe/exchange.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

using comm::Communicator;

struct UnevenHandle final : DispatchHandle {
  ops::Permutation permutation;  ///< slots of this rank by expert, so by destination rank
  RowCounts rows;                ///< of the dispatch; the combine goes the other way
  at::Tensor by_expert_R;        ///< int32: received row of each row in the experts' order
  at::Tensor by_rank_R;          ///< the inverse
};

// From [source rank][expert] counts to the positions of a transposition into [expert][source rank].
void order_by_expert(const std::vector<std::vector<std::int64_t>>& counts_PL, std::int64_t num_local,
                     UnevenHandle& handle) {
  handle.row_counts_L = at::zeros({num_local}, at::kLong);
  auto* totals = handle.row_counts_L.mutable_data_ptr<std::int64_t>();
  std::vector<std::vector<std::int64_t>> begin_PL(counts_PL.size());
  std::int64_t next = 0;
  for (std::size_t rank = 0; rank < counts_PL.size(); ++rank) {
    for (const std::int64_t count : counts_PL[rank]) {
      begin_PL[rank].push_back(next);
      next += count;
    }
  }
  handle.by_expert_R = at::empty({next}, at::kInt);
  handle.by_rank_R = at::empty({next}, at::kInt);
  auto* by_expert = handle.by_expert_R.mutable_data_ptr<std::int32_t>();
  auto* by_rank = handle.by_rank_R.mutable_data_ptr<std::int32_t>();
  std::int32_t row = 0;
  for (std::size_t expert = 0; expert < static_cast<std::size_t>(num_local); ++expert) {
    for (std::size_t rank = 0; rank < counts_PL.size(); ++rank) {
      const std::int64_t count = counts_PL[rank][expert];
      totals[expert] += count;
      for (std::int64_t i = 0; i < count; ++i, ++row) {
        const auto received = static_cast<std::int32_t>(begin_PL[rank][expert] + i);
        by_expert[row] = received;
        by_rank[received] = row;
      }
    }
  }
}

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
    Exchange rows = start_exchange(*ep_, ops::gather_rows(x_TD, h->permutation.row_token_R), h->rows);
    Exchange weights = start_exchange(*ep_, rows_of_slots(weights_TK, h->permutation.row_slot_R), h->rows);
    return Pending<DispatchedRows>([h, rows, weights]() mutable -> DispatchedRows {
      rows.work.wait();
      weights.work.wait();
      return {.rows_RD = ops::gather_rows(rows.received, h->by_expert_R),
              .weights_R = weights.received.index_select(0, h->by_expert_R)};
    });
  }

  Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                              const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<UnevenHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine"));
    Exchange rows = start_exchange(*ep_, ops::gather_rows(rows_RD, h->by_rank_R), h->rows.reversed());
    return Pending<at::Tensor>([h, rows]() mutable {
      rows.work.wait();
      return ops::combine_rows(rows.received, h->permutation.slot_row_TK);
    });
  }

  Pending<at::Tensor> combine_backward(const at::Tensor& grad_y_TD,
                                       const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<UnevenHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine backward"));
    Exchange rows = start_exchange(*ep_, ops::gather_rows(grad_y_TD, h->permutation.row_token_R), h->rows);
    return Pending<at::Tensor>([h, rows]() mutable {
      rows.work.wait();
      return ops::gather_rows(rows.received, h->by_expert_R);
    });
  }

  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<UnevenHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch backward"));
    Exchange rows;
    if (grad_rows_RD.defined())
      rows = start_exchange(*ep_, ops::gather_rows(grad_rows_RD, h->by_rank_R), h->rows.reversed());
    Exchange weights = start_exchange(*ep_, grad_weights_R.index_select(0, h->by_rank_R), h->rows.reversed());
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
        next = std::copy(counts_E + placement_.first(rank), counts_E + placement_.first(rank + 1), next);
        handle->rows.send.push_back(std::reduce(next - placement_.count(rank), next));
      }
    }
    Exchange exchange = start_exchange(*ep_, outgoing, counts);
    exchange.work.wait();
    const auto* incoming = exchange.received.const_data_ptr<std::int64_t>();
    std::vector<std::vector<std::vector<std::int64_t>>> counts_CPL(handles.size());
    for (int rank = 0; rank < ep_->size(); ++rank) {
      for (std::size_t chunk = 0; chunk < handles.size(); ++chunk) {
        counts_CPL[chunk].emplace_back(incoming, incoming + num_local);
        handles[chunk]->rows.recv.push_back(std::reduce(incoming, incoming + num_local));
        incoming += num_local;
      }
    }
    for (std::size_t chunk = 0; chunk < handles.size(); ++chunk)
      order_by_expert(counts_CPL[chunk], num_local, *handles[chunk]);
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
