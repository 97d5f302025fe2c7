// SPDX-License-Identifier: Apache-2.0
#pragma once

// Work that every rank does on its own and that counts only when all of them succeeded.

#include <functional>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/comm/communicator.h"

namespace collegium::train {

/// What     Runs `part`, which must not communicate, on every rank, waits for all and tells each of them
///          what every rank's returned, in rank order.
/// Comm     all_gather of the returned text, and of its length.
/// Throws   Where `part` threw, its exception; on the other ranks PeerFailure with the first such rank and
///          its message. By then no rank is at work any more, so what they made can be removed.
std::vector<Json> on_all_ranks(comm::Communicator& world, const std::function<Json()>& part);

/// What     Requires that every rank comes with what rank 0 comes with.
/// Comm     on_all_ranks().
/// Throws   on every rank: ConfigError with `explain`(rank, its value, rank 0's value) of the first rank that
///          comes with something else.
void require_same_on_all_ranks(
    comm::Communicator& world, const Json& own,
    const std::function<std::string(std::size_t rank, const Json& theirs, const Json& first)>& explain);

}  // namespace collegium::train
