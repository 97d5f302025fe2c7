// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/routing_file.h"

#include <xxhash.h>

#include <cstring>
#include <optional>

#include "collegium/base/error.h"

namespace collegium {

namespace {

std::size_t ids_bytes(const RoutingHeader& header) {
  return static_cast<std::size_t>(header.num_tokens * header.width) * sizeof(std::int32_t);
}

// The record at `offset`, checked; nothing at the end of the file and at a torn tail.
std::optional<RoutingEntry> read_entry(std::span<const std::byte> file, std::size_t offset,
                                       const std::filesystem::path& path) {
  constexpr std::int64_t kMostTokens = std::int64_t{1} << 40;
  constexpr std::int64_t kMostExperts = std::int64_t{1} << 20;
  if (file.size() - offset < sizeof(RoutingHeader)) return std::nullopt;
  RoutingEntry entry{.header = {}, .begin = offset, .ids = offset + sizeof(RoutingHeader), .end = 0};
  RoutingHeader& h = entry.header;
  std::memcpy(&h, file.data() + offset, sizeof(h));
  require_config(h.num_tokens >= 0 && h.num_tokens < kMostTokens && h.width >= 1 &&
                     h.width <= h.num_experts && h.num_experts <= kMostExperts,
                 "{}: corrupt routing record at byte {}: {} tokens, {} of {} experts", path.string(), offset,
                 h.num_tokens, h.width, h.num_experts);
  const std::size_t checked = sizeof(RoutingHeader) + ids_bytes(h);
  std::uint64_t sum = 0;
  if (file.size() - offset < checked + sizeof(sum)) return std::nullopt;
  std::memcpy(&sum, file.data() + offset + checked, sizeof(sum));
  require_config(sum == XXH3_64bits(file.data() + offset, checked),
                 "{}: corrupt routing record at byte {}: wrong checksum", path.string(), offset);
  entry.end = offset + checked + sizeof(sum);
  return entry;
}

}  // namespace

std::vector<RoutingEntry> read_routing_entries(std::span<const std::byte> file,
                                               const std::filesystem::path& path) {
  require_config(file.size() >= kRoutingMagic.size() &&
                     std::memcmp(file.data(), kRoutingMagic.data(), kRoutingMagic.size()) == 0,
                 "{}: not a routing record (it does not begin with \"{}\")", path.string(), kRoutingMagic);
  std::vector<RoutingEntry> entries;
  for (auto entry = read_entry(file, kRoutingMagic.size(), path); entry;
       entry = read_entry(file, entry->end, path))
    entries.push_back(*entry);
  return entries;
}

std::vector<std::byte> routing_record_bytes(const RoutingHeader& header, std::span<const std::int32_t> ids) {
  constexpr std::size_t kMostIds = std::size_t{1} << 44;
  COLLEGIUM_CHECK(
      ids.size() < kMostIds && ids.size() == static_cast<std::size_t>(header.num_tokens * header.width),
      "{} ids for {} tokens of {}", ids.size(), header.num_tokens, header.width);
  const std::size_t checked = sizeof(header) + ids.size_bytes();
  std::vector<std::byte> record(checked + sizeof(std::uint64_t));
  std::memcpy(record.data(), &header, sizeof(header));
  if (!ids.empty()) std::memcpy(record.data() + sizeof(header), ids.data(), ids.size_bytes());
  const std::uint64_t sum = XXH3_64bits(record.data(), checked);
  std::memcpy(record.data() + checked, &sum, sizeof(sum));
  return record;
}

}  // namespace collegium
