// SPDX-License-Identifier: Apache-2.0
#include "collegium/parallel/groups.h"

#include <algorithm>
#include <set>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/plan/collectives.h"

namespace collegium::parallel {

moe::DispatcherKind chosen_dispatcher(std::span<const int> nodes, std::int64_t num_experts,
                                      std::int64_t top_k) {
  if (nodes.size() == 1) return moe::DispatcherKind::kUneven;  // nothing travels
  const std::set<int> names(nodes.begin(), nodes.end());
  const auto num_places = static_cast<double>(names.size() > 1 ? names.size() : nodes.size());
  const auto choices = static_cast<double>(std::min(top_k, num_experts));
  const double places = plan::distinct_groups(static_cast<double>(num_experts), choices, num_places);
  return places <= 0.5 * choices && moe::nodes_are_even(nodes) ? moe::DispatcherKind::kTwoLevel
                                                               : moe::DispatcherKind::kUneven;
}

namespace {

moe::DispatcherKind dispatcher_of_all(const comm::Communicator& world, const mesh::Mesh& mesh,
                                      const moe::MoeOptions& moe) {
  // There a token has as many experts as choose it.
  if (moe.router.selection == moe::Selection::kExpertChoice) return moe::DispatcherKind::kUneven;
  for (const std::vector<int>& group : mesh.groups({mesh::Axis::kEp})) {
    std::vector<int> nodes;
    for (const int member : group) nodes.push_back(world.node(member));
    const moe::DispatcherKind kind = chosen_dispatcher(nodes, moe.num_experts, moe.top_k);
    if (kind != moe::DispatcherKind::kTwoLevel) return kind;
  }
  return moe::DispatcherKind::kTwoLevel;
}

}  // namespace

int resolve_ep(const ParallelOptions& options, int num_ranks, std::int64_t num_experts) {
  if (options.ep == 0) {
    int largest = 1;
    for (int ep = 1; ep <= num_ranks && ep <= num_experts; ++ep) {
      if (num_ranks % ep == 0) largest = ep;
    }
    return largest;
  }
  require_config(options.ep <= num_experts, "parallel.ep = {}: must not exceed model.moe.num_experts = {}",
                 options.ep, num_experts);
  require_config(num_ranks % options.ep == 0, "parallel.ep = {}: must divide the number of ranks, {}",
                 options.ep, num_ranks);
  return static_cast<int>(options.ep);
}

void validate(const ParallelOptions& o) {
  require_config(o.ep >= 0, "parallel.ep = {}: must not be negative (0 = chosen)", o.ep);
  constexpr std::int64_t kMostChunks = 256;
  require_config(o.overlap.chunks >= 1 && o.overlap.chunks <= kMostChunks,
                 "parallel.overlap.chunks = {}: must lie between 1 and {}", o.overlap.chunks, kMostChunks);
  constexpr double kMostMib = 1048576.0;
  require_config(o.bucket_mib > 0.0 && o.bucket_mib <= kMostMib,
                 "parallel.bucket_mib = {}: must be positive, and at most {}", o.bucket_mib, kMostMib);
}

Groups make_groups(const std::shared_ptr<comm::Communicator>& world, const ParallelOptions& options,
                   const moe::MoeOptions& moe) {
  const int ep = resolve_ep(options, world->size(), moe.num_experts);
  Groups groups{.mesh = mesh::Mesh({.pp = 1, .dp = world->size(), .cp = 1, .tp = 1, .ep = ep, .etp = 1}),
                .place = {},
                .placement = {.num_experts = moe.num_experts, .num_ranks = ep},
                .dispatcher = {.kind = {}, .combine_fp32 = options.dispatcher.combine_fp32},
                .ledger = std::make_shared<comm::Ledger>(),
                .world = {},
                .dp = {},
                .ep = {},
                .edp = {}};
  groups.place = groups.mesh.coordinates(world->rank());
  groups.world = comm::with_ledger(world, groups.ledger, {.check = options.check_collectives});
  groups.dp = groups.world->split(0, groups.place.dp, "dp");
  groups.ep = groups.world->split(groups.place.edp, groups.place.ep, "ep");
  groups.edp = groups.world->split(groups.place.ep, groups.place.edp, "edp");
  groups.dispatcher.kind =
      options.dispatcher.kind ? *options.dispatcher.kind : dispatcher_of_all(*world, groups.mesh, moe);
  return groups;
}

moe::ExpertTransport make_transport(const Groups& groups, const ParallelOptions& options) {
  return {.dispatcher = moe::make_dispatcher(groups.dispatcher, groups.placement.num_experts, groups.ep),
          .overlap = options.overlap};
}

}  // namespace collegium::parallel
