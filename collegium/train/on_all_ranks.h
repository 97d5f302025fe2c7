// SPDX-License-Identifier: Apache-2.0
#pragma once

// Work that every rank does on its own and that counts only when all of them succeeded.

#include <functional>
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

}  // namespace collegium::train
