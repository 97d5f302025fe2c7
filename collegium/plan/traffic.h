// SPDX-License-Identifier: Apache-2.0
#pragma once

// What one rank sends: every collective of a step by its group, its bytes and how often; and a layout drawn.

#include <string>
#include <vector>

#include "collegium/plan/memory.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

/// One kind of message of a rank.
struct TrafficLine {
  std::string operation;  ///< "all-reduce", "dispatch", ...
  std::string purpose;
  std::string axes;  ///< the group's axes
  int ranks = 1;
  bool slow_link = false;      ///< the group spans more than one fast domain
  double bytes_per_use = 0.0;  ///< sent by one rank
  double uses = 0.0;           ///< per optimizer step
  double bytes() const { return bytes_per_use * uses; }
};

/// What     Everything that a rank of the first stage sends in an optimizer step.
/// Math     ring all-reduce of n bytes over g ranks: 2 n (g-1)/g; reduce-scatter or all-gather: n (g-1)/g;
///          dispatch or combine: rows of expert_traffic() x (D x 2 bytes, and 4 for the row's weight on the
///          way out).
std::vector<TrafficLine> step_traffic(const ModelSpec& model, const Layout& layout, const Workload& work,
                                      const Cluster& cluster, const Stack& stack);
/// What     The lines as a table with sums per link.
std::string format_traffic(const std::vector<TrafficLine>& lines);

/// What     A layout drawn: ranks on their machines with both foldings' coordinates, a group of every axis,
///          the traffic.
std::string explain_layout(const ModelSpec& model, const Layout& layout, const Workload& work,
                           const Cluster& cluster, const Stack& stack);

/// A variant of expert exchange beside its share of the step.
struct ExchangeShare {
  std::string variant;
  int ranks = 0;
  double share = 0.0;  ///< of the step, if nothing hides it
  double step_s = 0.0;
};
/// What     The expert exchange's share of a step on few and on many ranks, and what each remedy would give
///          back: deduplication, two levels, node-limited routing, placement that keeps a token's experts
///          together, overlap.
std::vector<ExchangeShare> exchange_shares(const ModelSpec& model, const Layout& layout, const Workload& work,
                                           const Cluster& cluster, const Stack& stack);

/// What     The shares of a coarse and of a fine-grained model on 2 and on 32 ranks of one cluster, as
///          text, beside the 44.4 to 68.4 % that were published for 32 accelerators.
std::string format_exchange_shares(const Cluster& cluster, double seq_len);
/// The same as JSON.
Json exchange_shares_json(const Cluster& cluster, double seq_len);

}  // namespace collegium::plan
