// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/collectives.h"

#include <algorithm>
#include <cmath>

namespace collegium::plan {

namespace {

struct Tile {
  double m;
  double n;
  double reach;  // share of the best tile's rate: a smaller tile reads more per FLOP
};
constexpr Tile kTiles[] = {{256, 128, 1.0}, {128, 128, 0.93}, {64, 128, 0.75}, {64, 64, 0.5}};

// Narrow formats reach less of their higher peaks: power and the bandwidth of operands and scales do not
// double with them.
double format_share(const std::string& format) {
  if (format == "fp8") return 0.8;
  if (format == "fp4") return 0.6;
  return 1.0;
}

}  // namespace

double gemm_utilisation(const Accelerator& a, double m, double n, double k, double groups) {
  double best = 0.0;
  for (const Tile& tile : kTiles) {
    const double tiles = groups * std::ceil(m / tile.m) * std::ceil(n / tile.n);
    const double useful = groups * (m / tile.m) * (n / tile.n);
    const double waves = std::ceil(tiles / a.compute_units);
    best = std::max(best, tile.reach * useful / (waves * a.compute_units));
  }
  return best * k / (k + kStartDepth);
}

double gemm_seconds(const Accelerator& a, const std::string& format, double m, double n, double k,
                    double groups) {
  if (m <= 0.0) return 0.0;
  const auto falloff = a.gemm_falloff.find(format);
  const double utilisation =
      falloff == a.gemm_falloff.end()
          ? gemm_utilisation(a, m, n, k, groups)
          : m * n * k /
                ((m + falloff->second.rows) * (n + falloff->second.columns) * (k + falloff->second.depth));
  const double rate = peak_flops(a, format) * a.gemm_efficiency * format_share(format) * utilisation;
  const double compute = 2.0 * m * n * k * groups / rate;
  const double bytes = (format == "fp32" ? 4.0 : 2.0) * groups * (m * k + k * n + m * n);
  return std::max(compute, stream_seconds(a, bytes)) + a.launch_us * 1e-6;
}

double stream_seconds(const Accelerator& a, double bytes) {
  return bytes / (a.memory_gb_per_s * 1e9 * a.memory_efficiency);
}

double update_seconds(const Accelerator& a, double bytes) {
  if (a.optimizer_efficiency == 0.0) return stream_seconds(a, bytes);
  return bytes / (a.memory_gb_per_s * 1e9 * a.optimizer_efficiency);
}

Group group_of(const Cluster& cluster, int ranks, int stride) {
  const int inside = std::max(1, cluster.fast_domain / std::max(1, stride));
  return {.ranks = static_cast<double>(ranks), .in_domain = static_cast<double>(std::min(ranks, inside))};
}

namespace {

Group with_copies(Group group, const Cluster& cluster, const Layout& l) {
  group.ranks *= l.stage_copies();
  if (l.world() <= cluster.fast_domain) group.in_domain *= l.stage_copies();
  return group;
}

}  // namespace

Group replica_group(const Cluster& cluster, const Layout& l) {
  return with_copies(group_of(cluster, l.dp * l.cp, l.tp), cluster, l);
}

Group expert_replica_group(const Cluster& cluster, const Layout& l) {
  return with_copies(group_of(cluster, l.expert_dp(), l.ep * l.etp), cluster, l);
}

double ring_bandwidth(const Cluster& cluster, const Group& g) {
  const double fast = cluster.fast_link.gb_per_s * 1e9 * cluster.fast_link.efficiency;
  if (g.ranks <= g.in_domain) return fast;
  return std::min(fast, cluster.slow_link.gb_per_s * 1e9 * cluster.slow_link.efficiency * g.in_domain);
}

double gather_seconds(const Cluster& cluster, const Group& g, double bytes) {
  if (g.ranks <= 1.0) return 0.0;
  const double domains = g.ranks / g.in_domain;
  // Large groups use trees between domains: their latency grows with the logarithm.
  const double hops = (g.in_domain - 1.0) * cluster.fast_link.latency_us * 0.3 +
                      std::log2(std::max(1.0, domains)) * cluster.slow_link.latency_us;
  return (g.ranks - 1.0) / g.ranks * bytes / ring_bandwidth(cluster, g) +
         (cluster.fast_link.latency_us + hops) * 1e-6;
}

double all_reduce_seconds(const Cluster& cluster, const Group& g, double bytes) {
  return 2.0 * gather_seconds(cluster, g, bytes);
}

double send_seconds(const Cluster& cluster, int stride, double bytes) {
  const Link& link = stride < cluster.fast_domain ? cluster.fast_link : cluster.slow_link;
  return bytes / (link.gb_per_s * 1e9 * link.efficiency) + link.latency_us * 1e-6;
}

namespace {

// C(N - n, K) / C(N, K), the chance that K of N miss n of them, as a product, so that nothing overflows.
double chance_to_miss(double all, double missed, double choices) {
  double chance = 1.0;
  for (int i = 0; i < choices; ++i)  // the last of a mean number of choices counts in part
    chance *= std::pow(std::max(0.0, (all - missed - i) / (all - i)), std::min(1.0, choices - i));
  return chance;
}

}  // namespace

double distinct_groups(double experts, double top_k, double groups) {
  if (groups <= 1.0) return 1.0;
  return groups * (1.0 - chance_to_miss(experts, experts / groups, top_k));
}

double distinct_places(const ModelSpec& m, double places) {
  const auto experts = static_cast<double>(m.experts);
  const double top_k = m.experts_per_token();
  const double anywhere = distinct_groups(experts, top_k, places);
  if (m.routing_groups == 0 || places <= 1.0) return anywhere;
  const auto groups = static_cast<double>(m.routing_groups);
  const double chosen = std::min(static_cast<double>(m.routing_top_groups), top_k);
  if (places <= groups) return std::min(anywhere, distinct_groups(groups, chosen, places));
  // One expert in every chosen group, the others anywhere among these: a group is chosen for its scores.
  const double per_group = places / groups;
  const double missed = (1.0 - 1.0 / per_group) *
                        chance_to_miss(experts * chosen / groups - chosen, experts / places, top_k - chosen);
  return std::min(anywhere, per_group * chosen * (1.0 - missed));
}

double exchange_bandwidth(const Link& link) {
  return link.all_to_all_gb_per_s > 0.0 ? link.all_to_all_gb_per_s * 1e9
                                        : link.gb_per_s * 1e9 * link.efficiency;
}

double exchange_latency_us(const Link& link) {
  return link.all_to_all_latency_us > 0.0 ? link.all_to_all_latency_us : 2.0 * link.latency_us;
}

ExpertTraffic expert_traffic(const ModelSpec& m, const Layout& l, const Cluster& cluster, double imbalance) {
  if (!m.is_moe() || l.ep == 1) return {};
  const double ranks = l.ep;
  const double in_domain = std::min<double>(ranks, std::max(1, cluster.fast_domain / l.etp));
  const double domains = ranks / in_domain;
  const double remote_share = 1.0 - 1.0 / domains;
  const double rank_rows = distinct_places(m, ranks);
  double rows = m.experts_per_token();
  if (l.dispatcher == Dispatcher::kDeduplicated) rows = rank_rows;
  if (l.dispatcher == Dispatcher::kPadded) rows *= imbalance;
  if (l.dispatcher == Dispatcher::kAllGather) rows = ranks;
  ExpertTraffic t;
  t.slow_rows = rows * remote_share;
  t.fast_rows = rows * (1.0 - 1.0 / ranks) - t.slow_rows;
  if (l.dispatcher == Dispatcher::kSharedMemory) t.fast_rows = 0.0;
  if (l.dispatcher == Dispatcher::kHierarchical) {
    t.slow_rows = distinct_places(m, domains) * remote_share;
    t.fast_rows = rank_rows * (1.0 - 1.0 / in_domain);
  }
  return t;
}

double expert_exchange_seconds(const ModelSpec& m, const Layout& l, const Cluster& cluster, double tokens,
                               double row_bytes, double imbalance) {
  const ExpertTraffic t = expert_traffic(m, l, cluster, imbalance);
  const bool meets = m.is_moe() && l.ep > 1;  // even where no row travels
  if (!meets) return 0.0;
  const double in_domain = std::min<double>(l.ep, std::max(1, cluster.fast_domain / l.etp));
  const double fast = tokens * t.fast_rows * row_bytes / exchange_bandwidth(cluster.fast_link);
  const double slow = tokens * t.slow_rows * row_bytes / exchange_bandwidth(cluster.slow_link);
  const double latency = exchange_latency_us(cluster.fast_link) +
                         (l.ep > in_domain ? exchange_latency_us(cluster.slow_link) : 0.0);
  // The fullest rank receives `imbalance` times the mean; the others wait for it. Padded blocks have grown by
  // it already, and every rank gets all tokens whatever their experts are.
  const bool even = l.dispatcher == Dispatcher::kPadded || l.dispatcher == Dispatcher::kAllGather;
  return std::max(fast, slow) * (even ? 1.0 : imbalance) + latency * 1e-6;
}

}  // namespace collegium::plan
