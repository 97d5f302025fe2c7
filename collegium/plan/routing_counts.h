// SPDX-License-Identifier: Apache-2.0
#pragma once

// How many tokens every expert got, read from the routing that `collegium train --record-routing` wrote.

#include <cstdint>
#include <filesystem>
#include <vector>

namespace collegium::plan {

/// The choices of one layer in one micro-step of all ranks that wrote into the file.
struct RoutingRecord {
  std::int64_t step = 0;
  std::int64_t micro_step = 0;
  std::int64_t layer = 0;
  std::int64_t tokens = 0;
  std::vector<std::int64_t> counts_E;  ///< rows per expert, before any drop
  std::vector<std::int32_t> ids_TK;    ///< the choices themselves; -1 = none
};

struct RoutingCounts {
  std::int64_t experts = 0;
  std::int64_t top_k = 0;
  std::vector<RoutingRecord> records;  ///< in the file's order
};

/// What     Reads a routing record (base/routing_file.h). A torn last record is ignored.
/// Throws   ConfigError naming path and byte: another kind of file, a corrupt record, experts or choices that
///          differ between records, no record at all.
RoutingCounts read_routing(const std::filesystem::path& path);

/// What     Rows of the fullest of `ranks` ranks over the mean; experts lie on ranks in consecutive blocks,
///          the first ranks holding one more where they do not divide. 1 when no row was routed.
double rank_imbalance(const std::vector<std::int64_t>& counts_E, int ranks);

}  // namespace collegium::plan
