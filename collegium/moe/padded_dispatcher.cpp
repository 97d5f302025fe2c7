// SPDX-License-Identifier: Apache-2.0

// Blocks of one size travel: every (sender rank, expert) pair is padded with zero rows to C rows, the same C
// on all ranks, so shapes depend on nothing but C [GShard]. The experts compute on the padding.
//
//   sent, by expert:            e0: a b . | e1: c . . | e2: d e f | e3: . . .       C = 3, . = zero row
//   received, by expert:        e0: a b . g . . | e1: c . . h i .                   g h i from rank 1

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>

#include "collegium/moe/block_dispatcher.h"
#include "collegium/moe/exchange.h"

namespace collegium::moe {

namespace {

std::int64_t largest_count(const BlockHandle& handle) {
  const at::Tensor& counts_E = handle.permutation.counts_E;
  const auto* counts = counts_E.const_data_ptr<std::int64_t>();
  return std::max(std::int64_t{0}, *std::max_element(counts, counts + counts_E.numel()));
}

// Rows are spread out so that expert e's begin at e C.
void place_rows(BlockHandle& handle, std::int64_t block, std::int64_t num_experts) {
  const ops::Permutation& permutation = handle.permutation;
  handle.place_R = at::empty({permutation.row_token_R.numel()}, at::kLong);
  handle.row_token_X = at::full({num_experts * block}, -1, at::kInt);
  handle.slot_row_TK = at::full(permutation.slot_row_TK.sizes(), -1, at::kInt);
  const auto* counts = permutation.counts_E.const_data_ptr<std::int64_t>();
  const auto* row_token = permutation.row_token_R.const_data_ptr<std::int32_t>();
  const auto* row_slot = permutation.row_slot_R.const_data_ptr<std::int32_t>();
  auto* place = handle.place_R.mutable_data_ptr<std::int64_t>();
  auto* padded_row_token = handle.row_token_X.mutable_data_ptr<std::int32_t>();
  auto* slot_padded_row = handle.slot_row_TK.mutable_data_ptr<std::int32_t>();
  std::int64_t row = 0;
  for (std::int64_t expert = 0; expert < num_experts; ++expert) {
    for (std::int64_t i = 0; i < counts[expert]; ++i, ++row) {
      const std::int64_t padded_row = expert * block + i;
      place[row] = padded_row;
      padded_row_token[padded_row] = row_token[row];
      slot_padded_row[row_slot[row]] = static_cast<std::int32_t>(padded_row);
    }
  }
}

class PaddedDispatcher final : public BlockDispatcher {
 public:
  using BlockDispatcher::BlockDispatcher;

  std::vector<std::shared_ptr<DispatchHandle>> plan(const DispatchRequest& request) override {
    const comm::WhereScope scope(group().where(), at_phase(request.where, "plan"));
    const auto handles = start_plan(request);
    const at::Tensor blocks = at::empty({static_cast<std::int64_t>(handles.size())}, at::kLong);
    auto* block = blocks.mutable_data_ptr<std::int64_t>();
    for (std::size_t i = 0; i < handles.size(); ++i) {
      // A token goes to an expert once, so no capacity can fill more rows than there are tokens.
      const std::int64_t capacity = std::min(request.capacity_rows, request.chunk_ids_TK[i].size(0));
      block[i] = std::max(capacity, largest_count(*handles[i]));
    }
    group().all_reduce(blocks, comm::ReduceOp::kMax).wait();
    block = blocks.mutable_data_ptr<std::int64_t>();
    for (std::size_t i = 0; i < handles.size(); ++i) lay_out(*handles[i], block[i]);
    return {handles.begin(), handles.end()};
  }

 private:
  void lay_out(BlockHandle& handle, std::int64_t block) const {
    const std::int64_t num_local = placement().count(group().rank());
    handle.row_counts_L = at::full({num_local}, group().size() * block, at::kLong);
    for (int rank = 0; rank < group().size(); ++rank) {
      handle.by_rank.rows.emplace_back(placement().count(rank), block);
      handle.by_expert.rows.emplace_back(num_local, block);
    }
    place_rows(handle, block, placement().num_experts);
    finish_plan(handle);
  }
};

}  // namespace

std::shared_ptr<Dispatcher> make_padded_dispatcher(const ExpertPlacement& placement,
                                                   std::shared_ptr<comm::Communicator> ep) {
  return std::make_shared<PaddedDispatcher>(placement, std::move(ep));
}

}  // namespace collegium::moe
