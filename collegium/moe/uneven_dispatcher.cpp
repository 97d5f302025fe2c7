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

#include "collegium/moe/block_dispatcher.h"
#include "collegium/moe/exchange.h"

namespace collegium::moe {

namespace {

class UnevenDispatcher final : public BlockDispatcher {
 public:
  using BlockDispatcher::BlockDispatcher;

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    const comm::WhereScope scope(group().where(), at_phase(request.where, "plan"));
    const auto handles = start_plan(request);
    exchange_counts(handles);
    for (const auto& handle : handles) finish_plan(*handle);
    return {handles.begin(), handles.end()};
  }

 private:
  // Every rank learns how many rows each rank has for each of its experts, of all chunks at once.
  void exchange_counts(const std::vector<std::shared_ptr<BlockHandle>>& handles) const {
    const auto num_chunks = static_cast<std::int64_t>(handles.size());
    const std::int64_t num_local = placement().count(group().rank());
    RowCounts counts;
    const at::Tensor outgoing = at::empty({num_chunks * placement().num_experts}, at::kLong);
    auto* next = outgoing.mutable_data_ptr<std::int64_t>();
    for (int rank = 0; rank < group().size(); ++rank) {
      counts.send.push_back(num_chunks * placement().count(rank));
      counts.recv.push_back(num_chunks * num_local);
      for (const auto& handle : handles) {
        const auto* counts_E = handle->permutation.counts_E.const_data_ptr<std::int64_t>();
        handle->by_rank.rows.emplace_back(counts_E + placement().first(rank),
                                          counts_E + placement().first(rank + 1));
        next = std::copy(handle->by_rank.rows.back().begin(), handle->by_rank.rows.back().end(), next);
      }
    }
    Exchange exchange = start_exchange(group(), outgoing, counts);
    exchange.work.wait();
    const auto* incoming = exchange.received.const_data_ptr<std::int64_t>();
    for (int rank = 0; rank < group().size(); ++rank) {
      for (const auto& handle : handles) {
        handle->by_expert.rows.emplace_back(incoming, incoming + num_local);
        incoming += num_local;
      }
    }
    for (const auto& handle : handles) {
      handle->row_counts_L = at::zeros({num_local}, at::kLong);
      auto* totals = handle->row_counts_L.mutable_data_ptr<std::int64_t>();
      for (const std::vector<std::int64_t>& rows_L : handle->by_expert.rows)
        std::transform(rows_L.begin(), rows_L.end(), totals, totals, std::plus<>());
    }
  }
};

}  // namespace

std::shared_ptr<Dispatcher> make_uneven_dispatcher(const ExpertPlacement& placement,
                                                   std::shared_ptr<comm::Communicator> ep) {
  return std::make_shared<UnevenDispatcher>(placement, std::move(ep));
}

}  // namespace collegium::moe
