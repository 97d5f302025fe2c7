// SPDX-License-Identifier: Apache-2.0

// Blocks of one size travel: every (sender rank, expert) pair is padded with zero rows to C rows, the same C
// on all ranks, so shapes depend on nothing but C [GShard]. The experts compute on the padding.
//
//   sent, by expert:            e0: a b . | e1: c . . | e2: d e f | e3: . . .       C = 3, . = zero row
//   received, by expert:        e0: a b . g . . | e1: c . . h i .                   g h i from rank 1

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/moe/dispatcher.h"
#include "collegium/moe/exchange.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

using comm::Communicator;

struct PaddedHandle final : DispatchHandle {
  ops::Permutation permutation;    ///< slots of this rank by expert, without padding
  std::int64_t block = 0;          ///< C
  comm::RankBlocks by_rank;        ///< C rows for each expert of each rank
  comm::RankBlocks by_expert;      ///< C rows for each expert of this rank from each rank
  at::Tensor place_R;              ///< int64: padded row of each row
  at::Tensor padded_row_token_X1;  ///< int32 [E C, 1]: token of each padded row, -1 = padding
  at::Tensor slot_padded_row_TK;   ///< int32: padded row of each slot, -1 = none
};

// Rows are spread out so that expert e's begin at e C.
void place_rows(PaddedHandle& handle, std::int64_t num_experts) {
  const ops::Permutation& permutation = handle.permutation;
  const std::int64_t num_rows = permutation.row_token_R.numel();
  handle.place_R = at::empty({num_rows}, at::kLong);
  handle.padded_row_token_X1 = at::full({num_experts * handle.block, 1}, -1, at::kInt);
  handle.slot_padded_row_TK = at::full(permutation.slot_row_TK.sizes(), -1, at::kInt);
  const auto* counts = permutation.counts_E.const_data_ptr<std::int64_t>();
  const auto* row_token = permutation.row_token_R.const_data_ptr<std::int32_t>();
  const auto* row_slot = permutation.row_slot_R.const_data_ptr<std::int32_t>();
  auto* place = handle.place_R.mutable_data_ptr<std::int64_t>();
  auto* padded_row_token = handle.padded_row_token_X1.mutable_data_ptr<std::int32_t>();
  auto* slot_padded_row = handle.slot_padded_row_TK.mutable_data_ptr<std::int32_t>();
  std::int64_t row = 0;
  for (std::int64_t expert = 0; expert < num_experts; ++expert) {
    for (std::int64_t i = 0; i < counts[expert]; ++i, ++row) {
      const std::int64_t padded_row = expert * handle.block + i;
      place[row] = padded_row;
      padded_row_token[padded_row] = row_token[row];
      slot_padded_row[row_slot[row]] = static_cast<std::int32_t>(padded_row);
    }
  }
}

class PaddedDispatcher final : public Dispatcher {
 public:
  PaddedDispatcher(const ExpertPlacement& placement, std::shared_ptr<Communicator> ep)
      : placement_(placement), ep_(std::move(ep)), num_local_(placement_.count(ep_->rank())) {}

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    const comm::WhereScope scope(ep_->where(), at_phase(request.where, "plan"));
    const auto num_chunks = static_cast<std::int64_t>(request.chunk_ids_TK.size());
    std::vector<std::shared_ptr<DispatchHandle>> handles;
    const at::Tensor blocks = at::empty({num_chunks}, at::kLong);
    auto* block = blocks.mutable_data_ptr<std::int64_t>();
    for (const at::Tensor& ids_TK : request.chunk_ids_TK) {
      auto handle = std::make_shared<PaddedHandle>();
      handle->where = request.where;
      handle->permutation = ops::group_by_expert(ids_TK, placement_.num_experts);
      // A token goes to an expert once, so no capacity can fill more rows than there are tokens.
      *block++ = std::max(std::min(request.capacity_rows, ids_TK.size(0)), largest_count(*handle));
      handles.push_back(std::move(handle));
    }
    ep_->all_reduce(blocks, comm::ReduceOp::kMax).wait();
    block = blocks.mutable_data_ptr<std::int64_t>();
    for (const auto& handle : handles) lay_out(static_cast<PaddedHandle&>(*handle), *block++);
    return handles;
  }

  Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<PaddedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch"));
    at::Tensor padded_weights = at::zeros({h->padded_row_token_X1.size(0)}, weights_TK.options());
    padded_weights.index_copy_(0, h->place_R, rows_of_slots(weights_TK, h->permutation.row_slot_R));
    Exchange rows = start_exchange(*ep_, padded_rows(x_TD, *h), h->by_rank, h->by_expert);
    Exchange weights = start_exchange(*ep_, padded_weights, h->by_rank, h->by_expert);
    return Pending<DispatchedRows>([rows, weights]() mutable -> DispatchedRows {
      rows.work.wait();
      weights.work.wait();
      return {.rows = {.values_XD = rows.received, .index_R = {}}, .weights_R = weights.received};
    });
  }

  Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                              const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<PaddedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine"));
    Exchange rows = start_exchange(*ep_, rows_RD, h->by_expert, h->by_rank);
    return Pending<at::Tensor>([h, rows]() mutable {
      rows.work.wait();
      return ops::combine_rows(rows.received, h->slot_padded_row_TK);
    });
  }

  Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                           const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<PaddedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine backward"));
    Exchange rows = start_exchange(*ep_, padded_rows(grad_y_TD, *h), h->by_rank, h->by_expert);
    return Pending<ops::RowSource>([rows]() mutable -> ops::RowSource {
      rows.work.wait();
      return {.values_XD = rows.received, .index_R = {}};
    });
  }

  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<PaddedHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch backward"));
    Exchange rows;
    if (grad_rows_RD.defined()) rows = start_exchange(*ep_, grad_rows_RD, h->by_expert, h->by_rank);
    Exchange weights = start_exchange(*ep_, grad_weights_R, h->by_expert, h->by_rank);
    return Pending<DispatchGradients>([h, rows, weights]() mutable {
      rows.work.wait();
      weights.work.wait();
      const at::Tensor& slots_TK = h->slot_padded_row_TK;
      DispatchGradients gradients{.x_TD = {},
                                  .weights_TK = slots_of_rows(weights.received.index_select(0, h->place_R),
                                                              h->permutation.row_slot_R, slots_TK.sizes())};
      if (rows.received.defined()) gradients.x_TD = ops::combine_rows(rows.received, slots_TK);
      return gradients;
    });
  }

 private:
  static std::int64_t largest_count(const PaddedHandle& handle) {
    const at::Tensor& counts_E = handle.permutation.counts_E;
    const auto* counts = counts_E.const_data_ptr<std::int64_t>();
    return std::max(std::int64_t{0}, *std::max_element(counts, counts + counts_E.numel()));
  }

  void lay_out(PaddedHandle& handle, std::int64_t block) const {
    handle.block = block;
    handle.by_expert.block_major = true;
    handle.row_counts_L = at::full({num_local_}, ep_->size() * block, at::kLong);
    for (int rank = 0; rank < ep_->size(); ++rank) {
      handle.by_rank.rows.emplace_back(placement_.count(rank), block);
      handle.by_expert.rows.emplace_back(num_local_, block);
    }
    place_rows(handle, placement_.num_experts);
  }

  // A sum over one slot: a gather that gives zeros where there is no token.
  static at::Tensor padded_rows(const at::Tensor& x_TD, const PaddedHandle& handle) {
    return ops::combine_rows(x_TD, handle.padded_row_token_X1);
  }

  ExpertPlacement placement_;
  std::shared_ptr<Communicator> ep_;
  std::int64_t num_local_;
};

}  // namespace

std::shared_ptr<Dispatcher> make_padded_dispatcher(const ExpertPlacement& placement,
                                                   std::shared_ptr<Communicator> ep) {
  return std::make_shared<PaddedDispatcher>(placement, std::move(ep));
}

}  // namespace collegium::moe
