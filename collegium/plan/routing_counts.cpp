// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/routing_counts.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <span>
#include <string_view>

#include "collegium/base/error.h"
#include "collegium/base/file.h"

namespace collegium::plan {

namespace {

constexpr std::string_view kMagic = "CLGROUT1";
using Header = std::array<std::int64_t, 6>;  // step, micro-step, layer, T, K, E
constexpr std::int64_t kMostTokens = std::int64_t{1} << 40;
constexpr std::int64_t kMostExperts = std::int64_t{1} << 20;

// The choices behind a header, or nothing where the file ends before them.
std::span<const std::byte> ids_of(std::span<const std::byte> bytes, std::size_t at, const Header& header,
                                  const std::filesystem::path& path) {
  const auto [step, micro_step, layer, tokens, width, experts] = header;
  require_config(
      tokens >= 0 && tokens < kMostTokens && width >= 1 && width <= experts && experts <= kMostExperts,
      "{}: corrupt routing record at byte {}: {} tokens, {} of {} experts", path.string(), at, tokens, width,
      experts);
  const auto size = static_cast<std::size_t>(tokens * width) * sizeof(std::int32_t);
  const std::size_t whole = sizeof(Header) + size + sizeof(std::uint64_t);
  if (bytes.size() - at < whole) return {};
  std::uint64_t sum = 0;
  std::memcpy(&sum, bytes.data() + at + sizeof(Header) + size, sizeof(sum));
  require_config(sum == XXH3_64bits(bytes.data() + at, sizeof(Header) + size),
                 "{}: corrupt routing record at byte {}: wrong checksum", path.string(), at);
  return bytes.subspan(at, whole);
}

RoutingRecord read_record(const Header& header, std::span<const std::byte> record, std::size_t at,
                          const std::filesystem::path& path) {
  RoutingRecord r;
  r.step = header[0];
  r.micro_step = header[1];
  r.layer = header[2];
  r.tokens = header[3];
  r.counts_E.assign(static_cast<std::size_t>(header[5]), 0);
  r.ids_TK.resize(static_cast<std::size_t>(header[3] * header[4]));
  if (!r.ids_TK.empty())
    std::memcpy(r.ids_TK.data(), record.data() + sizeof(Header), r.ids_TK.size() * sizeof(std::int32_t));
  for (const std::int32_t id : r.ids_TK) {
    require_config(id >= -1 && id < header[5], "{}: record at byte {} names expert {}, there are {}",
                   path.string(), at, id, header[5]);
    if (id >= 0) ++r.counts_E[static_cast<std::size_t>(id)];
  }
  return r;
}

}  // namespace

RoutingCounts read_routing(const std::filesystem::path& path) {
  const MappedFile file(path);
  const std::span<const std::byte> bytes = file.bytes();
  require_config(
      bytes.size() >= kMagic.size() && std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0,
      "{}: not a routing record (it does not begin with \"{}\")", path.string(), kMagic);
  RoutingCounts all;
  for (std::size_t at = kMagic.size(); bytes.size() - at >= sizeof(Header);) {
    Header header{};
    std::memcpy(header.data(), bytes.data() + at, sizeof(header));
    const std::span<const std::byte> record = ids_of(bytes, at, header, path);
    if (record.empty()) break;
    if (all.records.empty()) {
      all.top_k = header[4];
      all.experts = header[5];
    }
    require_config(all.top_k == header[4] && all.experts == header[5],
                   "{}: record at byte {} has {} of {} experts, the first has {} of {}", path.string(), at,
                   header[4], header[5], all.top_k, all.experts);
    all.records.push_back(read_record(header, record, at, path));
    at += record.size();
  }
  require_config(!all.records.empty(), "{}: holds no routing", path.string());
  return all;
}

double rank_imbalance(const std::vector<std::int64_t>& counts_E, int ranks) {
  const auto experts = static_cast<std::int64_t>(counts_E.size());
  const std::int64_t total = std::accumulate(counts_E.begin(), counts_E.end(), std::int64_t{0});
  if (total == 0 || ranks <= 1) return 1.0;
  std::int64_t fullest = 0;
  std::int64_t expert = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    std::int64_t rows = 0;
    const std::int64_t held = experts / ranks + (rank < experts % ranks ? 1 : 0);
    for (std::int64_t i = 0; i < held; ++i) rows += counts_E[static_cast<std::size_t>(expert++)];
    fullest = std::max(fullest, rows);
  }
  return static_cast<double>(fullest) * ranks / static_cast<double>(total);
}

}  // namespace collegium::plan
