// SPDX-License-Identifier: Apache-2.0

// Ranks of one node read each other's rows where they lie. Every rank copies its tokens once to where all can
// read them; experts gather their rows from there and write results where all can read those; every token
// sums its own, in the order in which one rank would.
//
//   tokens, written by their ranks:        (of 0) a b c | (of 1) d e
//   read by the experts' ranks:            rank 0: e0: a d e, e1: b d      rank 1: e2: c e, e3: a b c
//   results, written by the experts:       (of 0) a d e b d | (of 1) c e a b c
//   read by the tokens' ranks:             rank 0: a: rows 0 and 7, b: rows 3 and 8, ...

#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/moe/dispatcher.h"
#include "collegium/moe/exchange.h"
#include "collegium/moe/shared_rows.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

using comm::Communicator;

// U counts the tokens of all ranks, X the rows of all experts.
struct SharedHandle final : DispatchHandle {
  RowShare tokens;
  RowShare rows;           // of this rank's experts
  at::Tensor row_token_R;  // among the tokens of all ranks
  at::Tensor row_slot_R;
  at::Tensor slot_row_TK;  // among the rows of all experts
  std::optional<SharedRows> results;
};

RowShare share_of(const std::vector<std::int64_t>& rows, int rank) {
  const auto own = rows.begin() + rank;
  return {
      .first = std::reduce(rows.begin(), own), .rows = *own, .total = std::reduce(rows.begin(), rows.end())};
}

class SharedMemoryDispatcher final : public Dispatcher {
 public:
  SharedMemoryDispatcher(const ExpertPlacement& placement, std::shared_ptr<Communicator> ep)
      : placement_(placement), ep_(std::move(ep)), pool_(std::make_shared<SharedRowPool>(ep_)) {}

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    const comm::WhereScope scope(ep_->where(), at_phase(request.where, "plan"));
    const auto tokens = exchange_token_counts(*ep_, request.chunk_ids_TK);
    std::vector<std::shared_ptr<DispatchHandle>> handles;
    std::vector<SharedRows> ids;
    for (std::size_t chunk = 0; chunk < tokens.size(); ++chunk)
      ids.push_back(pool_->copy(request.chunk_ids_TK[chunk], share_of(tokens[chunk], ep_->rank())));
    pool_->meet(ids).wait();
    for (std::size_t chunk = 0; chunk < tokens.size(); ++chunk) {
      const auto handle = plan_chunk(ids[chunk].all_XD, share_of(tokens[chunk], ep_->rank()));
      handle->where = request.where;
      handles.push_back(handle);
    }
    return handles;
  }

  Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<SharedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch"));
    const std::array<SharedRows, 2> shared = {pool_->copy(x_TD, h->tokens),
                                              pool_->copy(weights_TK, h->tokens)};
    return Pending<DispatchedRows>([h, shared, meeting = pool_->meet(shared)]() mutable -> DispatchedRows {
      meeting.wait();
      const auto& [x, weights] = shared;
      return {.rows = {x.all_XD, h->row_token_R}, .weights_R = rows_of_slots(weights.all_XD, h->row_slot_R)};
    });
  }

  at::Tensor result_rows(const at::Tensor& like, const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<SharedHandle>(handle);
    h->results = pool_->take(h->rows, like.size(1), like.scalar_type());
    return h->results->own_XD;
  }

  Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                              const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<SharedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine"));
    const std::array<SharedRows, 1> shared = {share_results(rows_RD, *h)};
    return Pending<at::Tensor>([h, shared, meeting = pool_->meet(shared)]() mutable {
      meeting.wait();
      return ops::combine_rows(shared[0].all_XD, h->slot_row_TK);
    });
  }

  Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                           const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<SharedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine backward"));
    const std::array<SharedRows, 1> shared = {pool_->copy(grad_y_TD, h->tokens)};
    return Pending<ops::RowSource>([h, shared, meeting = pool_->meet(shared)]() mutable -> ops::RowSource {
      meeting.wait();
      return {shared[0].all_XD, h->row_token_R};
    });
  }

  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<SharedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch backward"));
    std::vector<SharedRows> shared = {pool_->copy(grad_weights_R.unsqueeze(1), h->rows)};
    if (grad_rows_RD.defined()) shared.push_back(share_results(grad_rows_RD, *h));
    auto meeting = pool_->meet(shared);
    return Pending<DispatchGradients>([h, shared, meeting]() mutable -> DispatchGradients {
      meeting.wait();
      const at::Tensor weights_N1 = ops::gather_rows(shared[0].all_XD, h->slot_row_TK.flatten());
      return {.x_TD = shared.size() > 1 ? ops::combine_rows(shared[1].all_XD, h->slot_row_TK) : at::Tensor(),
              .weights_TK = weights_N1.view_as(h->slot_row_TK)};
    });
  }

 private:
  std::shared_ptr<SharedHandle> plan_chunk(const at::Tensor& ids_UK, const RowShare& tokens) const {
    const ops::Permutation all = ops::group_by_expert(ids_UK, placement_.num_experts);
    const int rank = ep_->rank();
    const auto* counts = all.counts_E.const_data_ptr<std::int64_t>();
    const std::int64_t begin = placement_.first(rank);
    const std::int64_t end = placement_.first(rank + 1);
    auto handle = std::make_shared<SharedHandle>();
    handle->tokens = tokens;
    handle->rows = {.first = std::reduce(counts, counts + begin),
                    .rows = std::reduce(counts + begin, counts + end),
                    .total = all.row_token_R.size(0)};
    handle->row_counts_L = all.counts_E.narrow(0, begin, end - begin).clone();
    // Copies: the rest of these need not stay until the backward pass.
    handle->row_token_R = handle->rows.of(all.row_token_R).clone();
    handle->row_slot_R = handle->rows.of(all.row_slot_R).clone();
    handle->slot_row_TK = tokens.of(all.slot_row_TK).clone();
    return handle;
  }

  // As they are where result_rows() said, or copied.
  SharedRows share_results(const at::Tensor& rows_RD, SharedHandle& handle) {
    if (!handle.results) return pool_->copy(rows_RD, handle.rows);
    SharedRows results = *std::exchange(handle.results, std::nullopt);
    if (!rows_RD.is_set_to(results.own_XD)) results.own_XD.copy_(rows_RD);
    return results;
  }

  ExpertPlacement placement_;
  std::shared_ptr<Communicator> ep_;
  std::shared_ptr<SharedRowPool> pool_;
};

}  // namespace

std::shared_ptr<Dispatcher> make_shared_memory_dispatcher(const ExpertPlacement& placement,
                                                          std::shared_ptr<Communicator> ep) {
  for (int rank = 1; rank < ep->size(); ++rank)
    require_config(
        ep->node(rank) == ep->node(0),
        "dispatcher kind = shared_memory: the ranks of group '{}' must be on one node, but rank 0 is on "
        "node {} and rank {} on node {}",
        ep->name(), ep->node(0), rank, ep->node(rank));
  // Whether they share memory shows here, before anything is computed.
  comm::SharedMemory::create(*ep, 1);
  return std::make_shared<SharedMemoryDispatcher>(placement, std::move(ep));
}

}  // namespace collegium::moe
