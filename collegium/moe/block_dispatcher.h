// SPDX-License-Identifier: Apache-2.0
#pragma once

// The four arrows of dispatchers whose rows travel straight to the ranks of their experts, in one block per
// rank and expert. What the blocks hold is for plan() to say: exactly the routed rows (uneven) or as many for
// all (padded). Rows for experts of this rank do not travel: the way out gathers them where the experts read
// them, after it has sent the others, and the way back sums them where the experts wrote them.

#include <memory>

#include "collegium/moe/dispatcher.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

/// "By rank" is the order of `by_rank`; X rows in it, padding included.
struct BlockHandle : DispatchHandle {
  ops::Permutation permutation;  ///< slots of this rank by expert, so by destination rank, without padding
  comm::RankBlocks by_rank;      ///< rows of this rank's tokens for each expert of each rank
  comm::RankBlocks by_expert;    ///< rows for each expert of this rank from each rank
  at::Tensor place_R;            ///< int64: where each routed row is by rank; undefined = at the same place
  at::Tensor row_token_X;        ///< int32: token of each row by rank, -1 = zeros
  at::Tensor slot_row_TK;        ///< int32: row of each slot by rank, -1 = none

  // From finish_plan() on, which sets Y rows for this rank's own experts apart and drops what no arrow
  // reads: the two above, and the rows of `permutation`.
  at::Tensor sent_token_X;  ///< int32: token of each row that travels, -1 = zeros
  at::Tensor own_token_Y;   ///< int32: token of each own row, -1 = zeros
  at::Tensor own_place_Y;   ///< int32: where it is among the experts' rows
  /// int32: row of each slot, -1 = none; own ones among the experts' rows, others after all of these.
  at::Tensor slot_source_TK;
  comm::RankBlocks sent_by_rank;        ///< without own rows
  comm::RankBlocks received_by_expert;  ///< own rows stay
};

class BlockDispatcher : public Dispatcher {
 public:
  BlockDispatcher(const ExpertPlacement& placement, std::shared_ptr<comm::Communicator> ep)
      : placement_(placement), ep_(std::move(ep)) {}

  Pending<DispatchedRows> dispatch(const at::Tensor& x_TD, const at::Tensor& weights_TK,
                                   const std::shared_ptr<DispatchHandle>& handle) final;
  Pending<at::Tensor> combine(const at::Tensor& rows_RD, const std::shared_ptr<DispatchHandle>& handle) final;
  Pending<ops::RowSource> combine_backward(const at::Tensor& grad_y_TD,
                                           const std::shared_ptr<DispatchHandle>& handle) final;
  Pending<DispatchGradients> dispatch_backward(const at::Tensor& grad_rows_RD,
                                               const at::Tensor& grad_weights_R,
                                               const std::shared_ptr<DispatchHandle>& handle) final;

 protected:
  const ExpertPlacement& placement() const { return placement_; }
  comm::Communicator& group() const { return *ep_; }
  /// What     A handle per chunk with its permutation.
  std::vector<std::shared_ptr<BlockHandle>> start_plan(const DispatchRequest& request) const;
  /// What     What plan() does last, when it knows all blocks and rows.
  void finish_plan(BlockHandle& handle) const;

 private:
  ExpertPlacement placement_;
  std::shared_ptr<comm::Communicator> ep_;
};

}  // namespace collegium::moe
