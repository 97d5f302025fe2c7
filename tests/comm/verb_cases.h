// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every backend must do, as bodies that all ranks of a group run: each rank rebuilds the data of all
// ranks from the same formula and compares bit by bit.

#include <functional>
#include <string>
#include <vector>

#include "collegium/comm/communicator.h"

namespace collegium::comm {

struct VerbCase {
  std::string name;
  std::function<void(Communicator&)> body;
};

/// All cases; they hold for any number of ranks.
const std::vector<VerbCase>& verb_cases();

/// Two ranks that agree on three rows for each other and not on their blocks.
void disagree_on_blocks(Communicator& comm);

}  // namespace collegium::comm
