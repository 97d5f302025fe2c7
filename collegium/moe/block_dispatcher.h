// SPDX-License-Identifier: Apache-2.0
#pragma once

// The four arrows of dispatchers whose rows travel straight to the ranks of their experts, in one block per
// rank and expert. What the blocks hold is for plan() to say: exactly the routed rows (uneven) or as many for
// all (padded).

#include <memory>

#include "collegium/moe/dispatcher.h"
#include "collegium/ops/permute.h"

namespace collegium::moe {

struct BlockHandle : DispatchHandle {
  ops::Permutation permutation;  ///< slots of this rank by expert, so by destination rank, without padding
  comm::RankBlocks by_rank;      ///< rows of this rank's tokens for each expert of each rank
  comm::RankBlocks by_expert;    ///< rows for each expert of this rank from each rank
  at::Tensor slot_row_TK;        ///< int32: row of each slot among those that travel, -1 = none
  at::Tensor place_R;       ///< int64: where each routed row is among padded ones; undefined = no padding
  at::Tensor row_token_X1;  ///< with padding int32 [X, 1]: token of each row that travels, -1 = zeros
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

 private:
  ExpertPlacement placement_;
  std::shared_ptr<comm::Communicator> ep_;
};

}  // namespace collegium::moe
