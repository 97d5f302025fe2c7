// SPDX-License-Identifier: Apache-2.0
#pragma once

// A rank's place in the mesh and the groups it communicates in.

#include <memory>

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

/// What     Places `world`'s ranks on the mesh dp = all ranks, ep and edp = dp / ep, and splits off the
///          groups. Where the user names no dispatcher, it is two_level if moe::chosen_dispatcher() says so
///          of every ep group, else uneven.
/// Comm     collective over `world`.
/// Throws   ConfigError: ep does not divide the ranks, or exceeds the experts.
Groups make_groups(const std::shared_ptr<comm::Communicator>& world, const ParallelOptions& options,
                   const moe::MoeOptions& moe);

/// What     How this rank's layers reach their experts.
/// Comm     may split ep (collective over it).
moe::ExpertTransport make_transport(const Groups& groups, const ParallelOptions& options);

}  // namespace collegium::parallel
