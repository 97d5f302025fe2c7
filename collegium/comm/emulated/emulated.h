// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "collegium/base/machine.h"
#include "collegium/comm/communicator.h"
#include "collegium/comm/emulated/network.h"

namespace collegium::comm {

/// What     A communicator whose messages complete no earlier than the described network would have
///          delivered them. The inner one moves the data; beside every call the ranks tell each other when
///          they posted it and how much, each computes when it would be done, and wait() sleeps until then.
///          All ranks must share one clock: they run on one machine, of which `machine` is this rank's. Nodes
///          are the network's. Groups made by split() share the ports of their ranks. A sleep ends some 50 us
///          late: slow the network (scale) so that this does not matter.
/// Comm     collective: an all_gather of the machines, and a group for the extra messages is split off.
/// Throws   ConfigError when the network does not have as many ranks as `world`, or these several machines.
std::shared_ptr<Communicator> with_emulated_network(const std::shared_ptr<Communicator>& world,
                                                    const Network& network,
                                                    const std::string& machine = machine_name());

}  // namespace collegium::comm
