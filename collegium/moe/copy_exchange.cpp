// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/copy_exchange.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>

#include <utility>

#include "collegium/ops/permute.h"

namespace collegium::moe {

namespace {

std::vector<std::int64_t> to_vector(const at::Tensor& counts) {
  const auto* values = counts.const_data_ptr<std::int64_t>();
  return {values, values + counts.numel()};
}

// Which pairs the received copies brought: the slots that hold an expert, copy by copy.
void list_received_pairs(CopyPlan& plan) {
  const std::int64_t top_k = plan.received_ids_UK.size(1);
  const auto* ids = plan.received_ids_UK.const_data_ptr<std::int32_t>();
  plan.received_slot_N = at::empty({plan.received_ids_UK.numel()}, at::kLong);
  auto* slots = plan.received_slot_N.mutable_data_ptr<std::int64_t>();
  std::int64_t slot = 0;
  std::int64_t total = 0;
  for (const std::int64_t copies : plan.copies.recv) {
    const std::int64_t before = total;
    for (const std::int64_t end = slot + copies * top_k; slot < end; ++slot) {
      if (ids[slot] >= 0) slots[total++] = slot;
    }
    plan.pairs.recv.push_back(total - before);
  }
  plan.received_slot_N = plan.received_slot_N.narrow(0, 0, total);
}

}  // namespace

CopyExchange::CopyExchange(std::shared_ptr<comm::Communicator> group, std::vector<int> rank_of_expert)
    : group_(std::move(group)), rank_of_expert_(std::move(rank_of_expert)) {}

std::vector<CopyPlan> CopyExchange::plan(std::span<const at::Tensor> chunk_ids_TK) const {
  std::vector<CopyPlan> plans(chunk_ids_TK.size());
  if (group_->size() == 1) {
    for (std::size_t chunk = 0; chunk < plans.size(); ++chunk) {
      plans[chunk].direct = true;
      plans[chunk].num_tokens = chunk_ids_TK[chunk].size(0);
      plans[chunk].received_ids_UK = chunk_ids_TK[chunk];
    }
    return plans;
  }
  for (std::size_t chunk = 0; chunk < plans.size(); ++chunk)
    choose_copies(chunk_ids_TK[chunk].contiguous(), plans[chunk]);
  exchange_counts(plans);
  exchange_ids(chunk_ids_TK, plans);
  for (CopyPlan& plan : plans) list_received_pairs(plan);
  return plans;
}

// Copies and pairs are slots grouped by rank: of [T, M] whether the token goes there, of [T, K] where to.
void CopyExchange::choose_copies(const at::Tensor& ids_TK, CopyPlan& plan) const {
  const std::int64_t num_tokens = ids_TK.size(0);
  const std::int64_t top_k = ids_TK.size(1);
  const std::int64_t num_ranks = group_->size();
  const at::Tensor pair_rank_TK = at::full(ids_TK.sizes(), -1, at::kInt);
  const at::Tensor copy_rank_TM = at::full({num_tokens, num_ranks}, -1, at::kInt);
  const auto* ids = ids_TK.const_data_ptr<std::int32_t>();
  auto* pair_rank = pair_rank_TK.mutable_data_ptr<std::int32_t>();
  auto* copy_rank = copy_rank_TM.mutable_data_ptr<std::int32_t>();
  for (std::int64_t slot = 0; slot < ids_TK.numel(); ++slot) {
    if (ids[slot] < 0) continue;
    const int rank = rank_of_expert_.at(static_cast<std::size_t>(ids[slot]));
    COLLEGIUM_CHECK(rank >= 0, "expert {} is not reached through group '{}'", ids[slot], group_->name());
    pair_rank[slot] = rank;
    copy_rank[slot / top_k * num_ranks + rank] = rank;
  }
  const ops::Permutation copies = ops::group_by_expert(copy_rank_TM, num_ranks);
  const ops::Permutation pairs = ops::group_by_expert(pair_rank_TK, num_ranks);
  plan.num_tokens = num_tokens;
  plan.copy_token_C = copies.row_token_R;
  plan.slot_copy_TM = copies.slot_row_TK;
  plan.copies.send = to_vector(copies.counts_E);
  plan.pair_slot_N = pairs.row_slot_R;
  plan.pairs.send = to_vector(pairs.counts_E);
}

void CopyExchange::exchange_counts(std::span<CopyPlan> plans) const {
  const auto num_chunks = static_cast<std::int64_t>(plans.size());
  const at::Tensor outgoing = at::empty({group_->size(), num_chunks}, at::kLong);
  const at::Tensor incoming = at::empty_like(outgoing);
  auto* out = outgoing.mutable_data_ptr<std::int64_t>();
  for (std::size_t rank = 0; rank < static_cast<std::size_t>(group_->size()); ++rank) {
    for (const CopyPlan& plan : plans) *out++ = plan.copies.send[rank];
  }
  group_->all_to_all(outgoing, incoming).wait();
  const auto* in = incoming.const_data_ptr<std::int64_t>();
  for (int rank = 0; rank < group_->size(); ++rank) {
    for (CopyPlan& plan : plans) plan.copies.recv.push_back(*in++);
  }
}

// A copy brings its token's experts at its destination, -1 in the place of the others.
void CopyExchange::exchange_ids(std::span<const at::Tensor> chunk_ids_TK, std::span<CopyPlan> plans) const {
  const std::int64_t top_k = chunk_ids_TK[0].size(1);
  RowCounts counts{.send = std::vector<std::int64_t>(static_cast<std::size_t>(group_->size()), 0),
                   .recv = {}};
  counts.recv = counts.send;
  std::vector<at::Tensor> blocks;  // [rank][chunk]
  std::vector<std::int64_t> begin(plans.size(), 0);
  for (int rank = 0; rank < group_->size(); ++rank) {
    const auto r = static_cast<std::size_t>(rank);
    for (std::size_t chunk = 0; chunk < plans.size(); ++chunk) {
      const CopyPlan& plan = plans[chunk];
      const at::Tensor tokens = plan.copy_token_C.narrow(0, begin[chunk], plan.copies.send[r]);
      const at::Tensor ids = chunk_ids_TK[chunk].index_select(0, tokens);
      auto* id = ids.mutable_data_ptr<std::int32_t>();
      for (std::int64_t i = 0; i < ids.numel(); ++i) {
        if (id[i] >= 0 && rank_of_expert_[static_cast<std::size_t>(id[i])] != rank) id[i] = -1;
      }
      blocks.push_back(ids);
      begin[chunk] += plan.copies.send[r];
      counts.send[r] += plan.copies.send[r];
      counts.recv[r] += plan.copies.recv[r];
    }
  }
  Exchange exchange = start_exchange(*group_, at::cat(blocks), counts);
  exchange.work.wait();
  std::vector<std::vector<at::Tensor>> arrived(plans.size());
  std::int64_t next = 0;
  for (std::size_t rank = 0; rank < counts.recv.size(); ++rank) {
    for (std::size_t chunk = 0; chunk < plans.size(); ++chunk) {
      const std::int64_t copies = plans[chunk].copies.recv[rank];
      arrived[chunk].push_back(exchange.received.narrow(0, next, copies));
      next += copies;
    }
  }
  for (std::size_t chunk = 0; chunk < plans.size(); ++chunk)
    plans[chunk].received_ids_UK = at::cat(arrived[chunk]).view({-1, top_k});
}

Exchange CopyExchange::send_rows(const at::Tensor& x_TD, const CopyPlan& plan) const {
  if (plan.direct) return {.received = x_TD, .work = {}};
  return start_exchange(*group_, ops::gather_rows(x_TD, plan.copy_token_C), plan.copies);
}

Exchange CopyExchange::send_weights(const at::Tensor& weights_TK, const CopyPlan& plan) const {
  if (plan.direct) return {.received = weights_TK, .work = {}};
  return start_exchange(*group_, rows_of_slots(weights_TK, plan.pair_slot_N), plan.pairs);
}

at::Tensor CopyExchange::arrived_weights(const at::Tensor& weights_N, const CopyPlan& plan) {
  if (plan.direct) return weights_N;
  return slots_of_rows(weights_N, plan.received_slot_N, plan.received_ids_UK.sizes());
}

Exchange CopyExchange::return_rows(const at::Tensor& rows_UD, const CopyPlan& plan) const {
  if (plan.direct) return {.received = rows_UD, .work = {}};
  return start_exchange(*group_, rows_UD, plan.copies.reversed());
}

at::Tensor CopyExchange::summed_rows(const at::Tensor& rows_CD, const CopyPlan& plan) {
  return plan.direct ? rows_CD : ops::combine_rows(rows_CD, plan.slot_copy_TM);
}

Exchange CopyExchange::return_weights(const at::Tensor& values_UK, const CopyPlan& plan) const {
  if (plan.direct) return {.received = values_UK, .work = {}};
  return start_exchange(*group_, rows_of_slots(values_UK, plan.received_slot_N), plan.pairs.reversed());
}

at::Tensor CopyExchange::returned_weights(const at::Tensor& values_N, const CopyPlan& plan) {
  if (plan.direct) return values_N;
  return slots_of_rows(values_N, plan.pair_slot_N, {plan.num_tokens, plan.received_ids_UK.size(1)});
}

}  // namespace collegium::moe
