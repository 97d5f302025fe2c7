// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/routing_counts.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/routing_file.h"

namespace collegium::plan {

namespace {

RoutingRecord read_record(std::span<const std::byte> file, const RoutingEntry& entry,
                          const std::filesystem::path& path) {
  const RoutingHeader& h = entry.header;
  RoutingRecord r;
  r.step = h.step;
  r.micro_step = h.micro_step;
  r.layer = h.layer;
  r.tokens = h.num_tokens;
  r.counts_E.assign(static_cast<std::size_t>(h.num_experts), 0);
  r.ids_TK.resize(static_cast<std::size_t>(h.num_tokens * h.width));
  if (!r.ids_TK.empty())
    std::memcpy(r.ids_TK.data(), file.data() + entry.ids, r.ids_TK.size() * sizeof(std::int32_t));
  for (const std::int32_t id : r.ids_TK) {
    require_config(id >= -1 && id < h.num_experts, "{}: record at byte {} names expert {}, there are {}",
                   path.string(), entry.begin, id, h.num_experts);
    if (id >= 0) ++r.counts_E[static_cast<std::size_t>(id)];
  }
  return r;
}

}  // namespace

RoutingCounts read_routing(const std::filesystem::path& path) {
  const MappedFile file(path);
  const std::vector<RoutingEntry> entries = read_routing_entries(file.bytes(), path);
  require_config(!entries.empty(), "{}: holds no routing", path.string());
  RoutingCounts all;
  all.top_k = entries[0].header.width;
  all.experts = entries[0].header.num_experts;
  for (const RoutingEntry& entry : entries) {
    const RoutingHeader& h = entry.header;
    require_config(all.top_k == h.width && all.experts == h.num_experts,
                   "{}: record at byte {} has {} of {} experts, the first has {} of {}", path.string(),
                   entry.begin, h.width, h.num_experts, all.top_k, all.experts);
    all.records.push_back(read_record(file.bytes(), entry, path));
  }
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
