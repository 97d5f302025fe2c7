// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/schedule.h"

#include <algorithm>

#include "collegium/base/error.h"

namespace collegium::plan {

namespace {

std::vector<Task> gpipe_order(const Pipeline& p, int rank) {
  std::vector<Task> order;
  for (int i = 0; i < p.micro_batches; ++i) order.push_back({Pass::kForward, i, rank});
  for (int i = 0; i < p.micro_batches; ++i) order.push_back({Pass::kBackward, i, rank});
  return order;
}

std::vector<Task> one_f_one_b_order(const Pipeline& p, int rank) {
  std::vector<Task> order;
  const int warm_up = std::min(p.ranks - 1 - rank, p.micro_batches);
  for (int i = 0; i < warm_up; ++i) order.push_back({Pass::kForward, i, rank});
  for (int i = 0; i < p.micro_batches; ++i) {
    if (i + warm_up < p.micro_batches) order.push_back({Pass::kForward, i + warm_up, rank});
    order.push_back({Pass::kBackward, i, rank});
  }
  return order;
}

// The k-th forward (or backward) of a rank: groups of `ranks` micro-batches walk through the rank's chunks in
// turn.
Task interleaved_task(const Pipeline& p, int rank, int k, Pass pass) {
  const int group = p.ranks * p.virtual_stages;
  int chunk = k % group / p.ranks;
  if (pass == Pass::kBackward) chunk = p.virtual_stages - 1 - chunk;
  return {pass, k / group * p.ranks + k % p.ranks, chunk * p.ranks + rank};
}

std::vector<Task> interleaved_order(const Pipeline& p, int rank) {
  const int total = p.micro_batches * p.virtual_stages;
  const int warm_up = std::min((p.ranks - rank - 1) * 2 + (p.virtual_stages - 1) * p.ranks, total);
  std::vector<Task> order;
  for (int k = 0; k < warm_up; ++k) order.push_back(interleaved_task(p, rank, k, Pass::kForward));
  for (int k = 0; k < total; ++k) {
    if (k + warm_up < total) order.push_back(interleaved_task(p, rank, k + warm_up, Pass::kForward));
    order.push_back(interleaved_task(p, rank, k, Pass::kBackward));
  }
  return order;
}

}  // namespace

int Pipeline::rank_of(const Task& task) const {
  return direction_of(task) == 1 ? ranks - 1 - task.chunk : task.chunk % ranks;
}

int Pipeline::direction_of(const Task& task) const {
  return schedule == Schedule::kDualPipe && task.micro_batch >= micro_batches / 2 ? 1 : 0;
}

bool splits_backward(Schedule schedule) {
  return schedule == Schedule::kZeroBubble || schedule == Schedule::kDualPipe;
}

std::vector<std::vector<Task>> fixed_order(const Pipeline& p) {
  require_config(p.ranks >= 1 && p.virtual_stages >= 1 && p.micro_batches >= 1,
                 "pipeline of {} ranks, {} virtual stages and {} micro-batches: each must be at least 1",
                 p.ranks, p.virtual_stages, p.micro_batches);
  if (p.schedule == Schedule::kDualPipe) {
    require_config(p.ranks % 2 == 0 && p.micro_batches % 2 == 0 && p.virtual_stages == 1,
                   "dualpipe: ranks = {} and micro-batches = {} must be even, virtual stages = {} must be 1",
                   p.ranks, p.micro_batches, p.virtual_stages);
  }
  if (p.virtual_stages > 1) {
    require_config(p.schedule == Schedule::kInterleaved || p.schedule == Schedule::k1F1B,
                   "virtual stages = {}: only the interleaved schedule has them", p.virtual_stages);
    require_config(p.micro_batches % p.ranks == 0,
                   "interleaved: ranks = {} must divide the micro-batches = {}", p.ranks, p.micro_batches);
  }
  std::vector<std::vector<Task>> orders;
  for (int rank = 0; rank < p.ranks; ++rank) {
    switch (p.schedule) {
      case Schedule::kGPipe:
        orders.push_back(gpipe_order(p, rank));
        break;
      case Schedule::k1F1B:
      case Schedule::kInterleaved:
        orders.push_back(p.virtual_stages > 1 ? interleaved_order(p, rank) : one_f_one_b_order(p, rank));
        break;
      case Schedule::kZeroBubble:
      case Schedule::kDualPipe:
        return {};
    }
  }
  return orders;
}

}  // namespace collegium::plan
