// SPDX-License-Identifier: Apache-2.0
#pragma once

// The file that holds recorded routing: what `moe` writes and replays, and `plan` counts.
//
// Format (little-endian): the 8 bytes "CLGROUT1", then records. A record is a header of 6 int64 (step,
// micro_step, layer, T, K, E), T K int32 expert ids before any drop (-1 = no expert), and a uint64 XXH3
// checksum of header and ids. A torn last record, which a killed run may leave, is ignored.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

namespace collegium {

inline constexpr std::string_view kRoutingMagic = "CLGROUT1";

/// What a record begins with.
struct RoutingHeader {
  std::int64_t step = 0;
  std::int64_t micro_step = 0;
  std::int64_t layer = 0;
  std::int64_t num_tokens = 0;
  std::int64_t width = 0;  ///< choices of a token
  std::int64_t num_experts = 0;
};

struct RoutingEntry {
  RoutingHeader header;
  std::size_t begin = 0;  ///< bytes from the file's beginning: of the record,
  std::size_t ids = 0;    ///< of its choices,
  std::size_t end = 0;    ///< and of what follows
};

/// What     Every whole record of a file's bytes, in their order.
/// Throws   ConfigError naming path and byte: another kind of file, a corrupt record.
std::vector<RoutingEntry> read_routing_entries(std::span<const std::byte> file,
                                               const std::filesystem::path& path);

/// What     A record's bytes. There are num_tokens * width ids.
std::vector<std::byte> routing_record_bytes(const RoutingHeader& header, std::span<const std::int32_t> ids);

}  // namespace collegium
