// SPDX-License-Identifier: Apache-2.0
#pragma once

// Seconds of kernels and collectives: a roofline for kernels, latency plus bytes over bandwidth for
// collectives on two levels of links. A machine's slow links are shared by its accelerators: a group gets the
// part that its members bring.

#include "collegium/plan/cluster.h"
#include "collegium/plan/layout.h"
#include "collegium/plan/model_spec.h"

namespace collegium::plan {

/// Depth that a tile of a product spends filling and draining its pipeline.
constexpr double kStartDepth = 220.0;

/// What     Share of the tile slots that an m x n product keeps busy: tiles / (waves * units), best of
///          three tile sizes, times what each tile size reaches, times the share of the depth k that is not
///          start-up.
double gemm_utilisation(const Accelerator& accelerator, double m, double n, double k, double groups = 1.0);
/// What     Seconds of `groups` products m x k by k x n in a number format ("bf16", "fp8", ...): the larger
///          of computing and of moving operands, plus a launch.
/// Throws   ConfigError when the accelerator has no such format.
double gemm_seconds(const Accelerator& accelerator, const std::string& format, double m, double n, double k,
                    double groups = 1.0);
/// What     Seconds of a kernel that streams `bytes` through memory.
double stream_seconds(const Accelerator& accelerator, double bytes);
/// What     The same of passes over weights, gradients and optimizer state.
double update_seconds(const Accelerator& accelerator, double bytes);

/// A group of ranks: how many, and how many of them lie in one fast domain.
struct Group {
  double ranks = 1.0;
  double in_domain = 1.0;
};
/// What     A group of `ranks` whose neighbours are `stride` world ranks apart, on this cluster.
Group group_of(const Cluster& cluster, int ranks, int stride);

/// What     The ranks that sum a rank's gradients of the dense part, and of its experts. DualPipe's mirror
///          stages lie in other domains unless all ranks are in one.
Group replica_group(const Cluster& cluster, const Layout& layout);
Group expert_replica_group(const Cluster& cluster, const Layout& layout);

/// What     Bytes per second that a ring through the group sustains: the fast link inside a domain; across
///          domains the members' share of their slow links, if that is less.
double ring_bandwidth(const Cluster& cluster, const Group& group);
/// What     Seconds to reduce-scatter or all-gather `bytes` (the whole tensor).
/// Math     (n-1)/n bytes / bandwidth + hops * latency
double gather_seconds(const Cluster& cluster, const Group& group, double bytes);
/// What     Seconds to all-reduce `bytes`: a reduce-scatter and an all-gather.
double all_reduce_seconds(const Cluster& cluster, const Group& group, double bytes);
/// What     Seconds to send `bytes` to a rank `stride` ranks away.
double send_seconds(const Cluster& cluster, int stride, double bytes);

/// What     Distinct groups of `groups` equal ones that a token's K of E experts touch, balanced random
///          choice.
/// Math     D(G) = G (1 - C(E - E/G, K) / C(E, K))
double distinct_groups(double experts, double top_k, double groups);
/// What     Places (ranks, domains), of `places` with equally many experts each, that a token's experts lie
///          in; under group-limited routing, M of N groups with a group's scores, fewer.
/// Math     at most D(P); P <= N: D of M groups over the places; else p = P/N places a group, one expert in
///          every chosen group and K - M anywhere in these: p M (1 - (1 - 1/p) C(n - E/P, K - M) /
///          C(n, K - M)), n = E M/N - M. Within 3 % of counted choices.
double distinct_places(const ModelSpec& model, double places);

/// What     Bytes per second that a rank sends in an all-to-all over a link, and the microseconds of one.
double exchange_bandwidth(const Link& link);
double exchange_latency_us(const Link& link);

/// Rows that one rank sends per token of its own, by link.
struct ExpertTraffic {
  double fast_rows = 0.0;
  double slow_rows = 0.0;
};
/// What     Rows per token and direction that leave a rank, by dispatcher, the rank's own experts excepted.
/// Math     a row per (token, expert): K (1 - 1/R); deduplicated: D(R) (1 - 1/R); hierarchical: D(N) (1 -
///          1/N) over slow links, the rest inside a domain, D as distinct_places(); gathered: R - 1; padded:
///          as all-to-all times the imbalance, since the largest pair's block goes to the fullest rank.
ExpertTraffic expert_traffic(const ModelSpec& model, const Layout& layout, const Cluster& cluster,
                             double imbalance);
/// What     Seconds of one dispatch or combine of `tokens` tokens of `row_bytes` each; both links work at
///          once. They last as long as those of the fullest rank, which receives `imbalance` times the mean:
///          but gathered ranks receive equally much, and so do padded ones, all that much.
double expert_exchange_seconds(const ModelSpec& model, const Layout& layout, const Cluster& cluster,
                               double tokens, double row_bytes, double imbalance);

}  // namespace collegium::plan
