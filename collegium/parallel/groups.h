// SPDX-License-Identifier: Apache-2.0
#pragma once

// A rank's place in the mesh and the groups it communicates in.

#include <memory>
#include <span>

#include "collegium/comm/communicator.h"
#include "collegium/comm/ledger.h"
#include "collegium/mesh/mesh.h"
#include "collegium/model/parameters.h"
#include "collegium/moe/dispatcher.h"
#include "collegium/moe/options.h"
#include "collegium/parallel/options.h"

namespace collegium::parallel {

/// The communicators write into one ledger. Sequences are spread over dp; a layer's experts over ep; ranks of
/// one edp group hold the same experts.
struct Groups {
  mesh::Mesh mesh;
  mesh::Coordinates place;
  moe::ExpertPlacement placement;
  moe::DispatcherOptions dispatcher;  ///< the user's, or chosen for the whole run
  std::shared_ptr<comm::Ledger> ledger;
  std::shared_ptr<comm::Communicator> world;
  std::shared_ptr<comm::Communicator> dp;   ///< sums of dense gradients, losses and monitors
  std::shared_ptr<comm::Communicator> ep;   ///< dispatch and combine
  std::shared_ptr<comm::Communicator> edp;  ///< sums of expert gradients

  int world_rank() const { return world->rank(); }
  bool is_root() const { return world->rank() == 0; }
  /// The experts of every layer that this rank holds.
  model::ExpertRange held_experts() const {
    return {.first = placement.first(place.ep), .count = placement.count(place.ep)};
  }
};

/// What     The kind that suits a group of ranks on these nodes where the user names none: two_level where a
///          token's experts, chosen at random, are expected on at most half as many nodes (ranks, if there is
///          one node) as there are of them, and every node holds as many ranks; else uneven, which copies
///          less on the way. A rule of sizes alone, so that reruns take the same way.
/// Math     N (1 - C(E - E/N, K) / C(E, K)) <= K / 2 for N nodes, or ranks of one node
/// Shape    nodes: of every rank of the group.
moe::DispatcherKind chosen_dispatcher(std::span<const int> nodes, std::int64_t num_experts,
                                      std::int64_t top_k);

/// What     Places `world`'s ranks on the mesh dp = all ranks, ep and edp = dp / ep, and splits off the
///          groups. Where the user names no dispatcher, it is two_level if chosen_dispatcher() says so
///          of every ep group, else uneven.
/// Comm     collective over `world`.
/// Throws   ConfigError: ep does not divide the ranks, or exceeds the experts.
Groups make_groups(const std::shared_ptr<comm::Communicator>& world, const ParallelOptions& options,
                   const moe::MoeOptions& moe);

/// What     How this rank's layers reach their experts.
/// Comm     may split ep (collective over it).
moe::ExpertTransport make_transport(const Groups& groups, const ParallelOptions& options);

}  // namespace collegium::parallel
