// SPDX-License-Identifier: Apache-2.0

// Every rank gets the tokens of all ranks and selects the rows of its experts; partial sums of all tokens are
// added on the way back. Bytes depend on the numbers of tokens only, not on the routing.
//
//   all_gather:          tokens (of 0) a b c (of 1) d e, with their weights
//   rows of e0, e1:      e0: a d e | e1: b d                       rank 0's experts
//   partial sums:        rank 0: a' b' 0 d' e'   rank 1: a" b" c" 0 0
//   reduce_scatter:      rank 0: a'+a" b'+b" c"  rank 1: d' e'

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <numeric>

#include "collegium/moe/dispatcher.h"
#include "collegium/moe/exchange.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

using comm::Communicator;

// U counts the tokens of all ranks.
struct AllgatherHandle final : DispatchHandle {
  std::vector<std::int64_t> tokens;  ///< of each rank
  ops::Permutation permutation;      ///< slots of all ranks' tokens by local expert

  std::int64_t total_tokens() const { return std::accumulate(tokens.begin(), tokens.end(), std::int64_t{0}); }
};

class AllgatherDispatcher final : public Dispatcher {
 public:
  AllgatherDispatcher(const ExpertPlacement& placement, std::shared_ptr<Communicator> ep, bool combine_fp32)
      : first_(placement.first(ep->rank())),
        num_local_(placement.count(ep->rank())),
        ep_(std::move(ep)),
        combine_fp32_(combine_fp32) {}

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    const comm::WhereScope scope(ep_->where(), at_phase(request.where, "plan"));
    const auto tokens = exchange_token_counts(*ep_, request.chunk_ids_TK);
    std::vector<std::shared_ptr<AllgatherHandle>> handles;
    std::vector<Exchange> ids;
    for (std::size_t chunk = 0; chunk < tokens.size(); ++chunk) {
      handles.push_back(std::make_shared<AllgatherHandle>());
      handles.back()->where = request.where;
      handles.back()->tokens = tokens[chunk];
      ids.push_back(gather(request.chunk_ids_TK[chunk], *handles.back()));
    }
    for (std::size_t chunk = 0; chunk < handles.size(); ++chunk) {
      ids[chunk].work.wait();
      const at::Tensor local_UK = ids[chunk].received - static_cast<std::int32_t>(first_);
      const at::Tensor here_UK = local_UK.ge(0).logical_and_(local_UK.lt(num_local_));
      handles[chunk]->permutation =
          ops::group_by_expert(at::where(here_UK, local_UK, at::full_like(local_UK, -1)), num_local_);
      handles[chunk]->row_counts_L = handles[chunk]->permutation.counts_E;
    }
    return {handles.begin(), handles.end()};
  }

  Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<AllgatherHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch"));
    Exchange tokens = gather(x_TD, *h);
    Exchange weights = gather(weights_TK, *h);
    return Pending<DispatchedRows>([h, tokens, weights]() mutable -> DispatchedRows {
      tokens.work.wait();
      weights.work.wait();
      return {.rows = {tokens.received, h->permutation.row_token_R},
              .weights_R = rows_of_slots(weights.received, h->permutation.row_slot_R)};
    });
  }

  Pending<at::Tensor> combine(const at::Tensor& rows_RD,
                              const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<AllgatherHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine"));
    Exchange sums = reduce(partial_sums(rows_RD, *h), *h);
    const at::ScalarType dtype = rows_RD.scalar_type();
    return Pending<at::Tensor>([sums, dtype]() mutable {
      sums.work.wait();
      return sums.received.to(dtype);
    });
  }

  Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                           const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<AllgatherHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "combine backward"));
    Exchange tokens = gather(grad_y_TD, *h);
    return Pending<ops::RowSource>([h, tokens]() mutable -> ops::RowSource {
      tokens.work.wait();
      return {tokens.received, h->permutation.row_token_R};
    });
  }

  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) override {
    const auto h = std::static_pointer_cast<AllgatherHandle>(handle);
    const comm::WhereScope scope(ep_->where(), at_phase(h->where, "dispatch backward"));
    Exchange sums;
    at::ScalarType dtype = at::ScalarType::Undefined;
    if (grad_rows_RD.defined()) {
      dtype = grad_rows_RD.scalar_type();
      sums = reduce(partial_sums(grad_rows_RD, *h), *h);
    }
    // A slot has its row on one rank, so these sums are exact.
    Exchange weights = reduce(
        slots_of_rows(grad_weights_R, h->permutation.row_slot_R, h->permutation.slot_row_TK.sizes()), *h);
    return Pending<DispatchGradients>([sums, weights, dtype]() mutable {
      sums.work.wait();
      weights.work.wait();
      DispatchGradients gradients{.x_TD = {}, .weights_TK = weights.received};
      if (sums.received.defined()) gradients.x_TD = sums.received.to(dtype);
      return gradients;
    });
  }

 private:
  Exchange gather(const at::Tensor& values_TX, const AllgatherHandle& handle) const {
    const at::Tensor all_UX = at::empty({handle.total_tokens(), values_TX.size(1)}, values_TX.options());
    return {.received = all_UX, .work = ep_->all_gather(values_TX.contiguous(), all_UX, handle.tokens)};
  }

  Exchange reduce(const at::Tensor& values_UX, const AllgatherHandle& handle) const {
    const std::int64_t own = handle.tokens[static_cast<std::size_t>(ep_->rank())];
    const at::Tensor sum_TX = at::empty({own, values_UX.size(1)}, values_UX.options());
    return {.received = sum_TX,
            .work = ep_->reduce_scatter(values_UX, sum_TX, comm::ReduceOp::kSum, handle.tokens)};
  }

  at::Tensor partial_sums(const at::Tensor& rows_RD, const AllgatherHandle& handle) const {
    const at::ScalarType dtype = rows_RD.scalar_type();
    return ops::combine_rows(combine_fp32_ ? rows_RD.to(at::toOpMathType(dtype)) : rows_RD,
                             handle.permutation.slot_row_TK);
  }

  std::int64_t first_;
  std::int64_t num_local_;
  std::shared_ptr<Communicator> ep_;
  bool combine_fp32_;
};

}  // namespace

std::shared_ptr<Dispatcher> make_allgather_dispatcher(const ExpertPlacement& placement,
                                                      std::shared_ptr<Communicator> ep, bool combine_fp32) {
  return std::make_shared<AllgatherDispatcher>(placement, std::move(ep), combine_fp32);
}

}  // namespace collegium::moe
