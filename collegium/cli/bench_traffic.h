// SPDX-License-Identifier: Apache-2.0
#pragma once

// How many bytes each rank must send in a layer's four arrows: from the routing alone, by formulas that know
// nothing of the dispatchers' code, so that the ledger's counts can be held against them.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "collegium/comm/call.h"
#include "collegium/comm/ledger.h"
#include "collegium/moe/dispatcher.h"

namespace collegium::cli {

/// Sent by one rank.
struct ArrowBytes {
  std::int64_t within_nodes = 0;
  std::int64_t between_nodes = 0;

  bool operator==(const ArrowBytes&) const = default;
  ArrowBytes& operator+=(const ArrowBytes& other) {
    within_nodes += other.within_nodes;
    between_nodes += other.between_nodes;
    return *this;
  }
};

/// The phases that the dispatchers write into the ledger, in the order of LayerBytes.
inline constexpr std::array<std::string_view, 4> kArrows = {"dispatch", "combine", "combine backward",
                                                            "dispatch backward"};
using LayerBytes = std::array<ArrowBytes, kArrows.size()>;

struct TrafficShape {
  moe::DispatcherOptions dispatcher;
  std::int64_t chunks = 1;
  std::int64_t num_experts = 0;
  std::int64_t row_bytes = 0;         ///< hidden x bytes of the compute dtype
  std::int64_t sum_bytes = 0;         ///< of a partial sum: row_bytes, or hidden x bytes of the wider dtype
  std::int64_t weight_bytes = 0;      ///< of one router weight
  std::vector<comm::Member> members;  ///< of the expert-parallel group
};

/// What     What each rank of the group sends, dropless.
/// Math     uneven: rows (and weights, dispatch and its backward) to experts of other ranks. padded: a block
///          of max over ranks and experts of the rows per (rank, expert, chunk). allgather: all tokens to all
///          ranks. two_level: per token and other node one copy; within a node one per rank that holds any
///          of its experts there; weights with their (token, expert) pairs. shared_memory: 8 bytes for rows
///          and 8 for weights, per arrow, chunk and rank.
/// Shape    ids_TK: of each rank of the group, int32 [T, K].
std::vector<LayerBytes> expected_bytes(const TrafficShape& shape, const std::vector<at::Tensor>& ids_TK);

/// What     What this rank's ledger holds in the four arrows, all groups together.
LayerBytes counted_bytes(const comm::Ledger& ledger);

/// What     Copies that cross nodes: sum over tokens of the nodes, its own left out, with any of its experts.
std::int64_t remote_copies(const TrafficShape& shape, const std::vector<at::Tensor>& ids_TK);

/// What     Its expectation per token when all sets of K experts are equally likely.
/// Math     D(G) (1 - 1/G), D(G) = G (1 - C(E - E/G, K) / C(E, K)) for G nodes of E/G experts.
double expected_remote_copies(std::int64_t num_experts, std::int64_t top_k, std::int64_t num_nodes);

}  // namespace collegium::cli
