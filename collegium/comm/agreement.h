// SPDX-License-Identifier: Apache-2.0
#pragma once

// Do the ranks of a group mean the same call? Backends that see all ranks' calls ask it always, the ledger in
// its checking mode.

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "collegium/comm/call.h"

namespace collegium::comm {

/// What     The first contradiction between the calls of the ranks (calls[r] is rank r's; for send and recv
///          the two calls of a pair, sender first, `ranks` their group ranks), as text that names both
///          ranks, their place in the program and the numbers; nothing when they agree.
std::optional<std::string> find_disagreement(const Group& group, std::span<const int> ranks,
                                             std::span<const Call* const> calls);

/// What     A call's numbers as a fixed count of integers (packed_call_size(group size)), without tensors:
///          what the checking mode exchanges.
std::vector<std::int64_t> pack_call(const Call& call, int group_size);
/// What     Integers of a packed call in a group of this size.
std::size_t packed_call_size(int group_size);
/// What     The reverse: a call without tensors that find_disagreement() understands.
Call unpack_call(std::span<const std::int64_t> packed, int group_size);

}  // namespace collegium::comm
