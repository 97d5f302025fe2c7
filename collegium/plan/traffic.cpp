// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/traffic.h"

#include <algorithm>

#include "collegium/base/units.h"
#include "collegium/plan/collectives.h"

namespace collegium::plan {

namespace {

bool spans_domains(const Cluster& c, int ranks, int stride) { return ranks * stride > c.fast_domain; }

double ring_share(int ranks) { return static_cast<double>(ranks - 1) / ranks; }

void add_tensor(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c,
                const StageWeights& weights, std::vector<TrafficLine>& lines) {
  if (l.tp == 1) return;
  const double bytes = 2.0 * l.micro_batch * w.seq_len / l.cp * static_cast<double>(m.hidden);
  const double passes = l.recompute.full ? 3.0 : 2.0;
  const double blocks = tensor_blocks(m, false) * (weights.layers - weights.moe_layers) +
                        tensor_blocks(m, true) * weights.moe_layers;
  lines.push_back({l.sequence_parallel ? "all-gather + reduce-scatter" : "all-reduce",
                   "hidden states, one per attention, dense or shared network, and pass", "tp", l.tp,
                   spans_domains(c, l.tp, 1), 2.0 * bytes * ring_share(l.tp),
                   passes * blocks * num_micro_batches(l, w)});
}

void add_context(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c, double layers,
                 std::vector<TrafficLine>& lines) {
  if (l.cp == 1) return;
  const double kv =
      4.0 * l.micro_batch * w.seq_len / l.cp * static_cast<double>(m.kv_heads * m.head_dim) / l.tp;
  lines.push_back({"ring exchange", "keys and values, forward and (twice) backward", "cp", l.cp,
                   spans_domains(c, l.cp, l.tp), kv * (l.cp - 1.0), 3.0 * layers * num_micro_batches(l, w)});
}

void add_experts(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c, double moe_layers,
                 std::vector<TrafficLine>& lines) {
  if (l.ep == 1 || moe_layers <= 0.0) return;
  const ExpertTraffic t = expert_traffic(m, l, c, w.imbalance);
  const double tokens = l.micro_batch * w.seq_len / l.cp / l.tp;
  const double hidden = 2.0 * static_cast<double>(m.hidden);
  const double uses =
      moe_layers * num_micro_batches(l, w) * (l.recompute.full || l.recompute.moe ? 3.0 : 2.0);
  const auto add = [&](const char* where, bool slow, double rows) {
    if (rows <= 0.0) return;
    lines.push_back({"dispatch", fmt::format("rows and their weights, {}", where), "ep", l.ep, slow,
                     tokens * rows * (hidden + 4.0), uses});
    lines.push_back({"combine", fmt::format("expert outputs, {}", where), "ep", l.ep, slow,
                     tokens * rows * hidden, uses});
  };
  add("inside a domain", false, t.fast_rows);
  add("between domains", true, t.slow_rows);
}

void add_data(const Layout& l, const Cluster& c, const Stack& s, const StageWeights& weights, double micro,
              std::vector<TrafficLine>& lines) {
  const auto one = [&](const char* what, const char* axes, const Group& group, double parameters) {
    const int ranks = static_cast<int>(group.ranks);
    if (ranks == 1 || parameters <= 0.0) return;
    const bool slow = group.ranks > group.in_domain;
    const double share = ring_share(ranks);
    if (l.zero == Zero::kNone) {
      lines.push_back({"all-reduce", fmt::format("gradients of {}", what), axes, ranks, slow,
                       2.0 * share * parameters * s.reduce_bytes, 1.0});
      return;
    }
    const double times = l.zero >= Zero::kGradients ? micro : 1.0;
    lines.push_back({"reduce-scatter", fmt::format("gradients of {}", what), axes, ranks, slow,
                     share * parameters * s.reduce_bytes, times});
    lines.push_back({"all-gather", fmt::format("weights of {}", what), axes, ranks, slow,
                     share * parameters * s.weight_bytes, l.zero == Zero::kSharded ? 2.0 * micro : 1.0});
  };
  const bool mirrored = l.stage_copies() > 1;
  one("the dense part", mirrored ? "dp, cp, pp" : "dp, cp", replica_group(c, l), weights.dense);
  one("experts", mirrored ? "edp, pp" : "edp", expert_replica_group(c, l), weights.experts);
}

}  // namespace

std::vector<TrafficLine> step_traffic(const ModelSpec& m, const Layout& l, const Workload& w,
                                      const Cluster& c, const Stack& s) {
  std::vector<TrafficLine> lines;
  const StageWeights weights = held_weights(m, l, s, 0);
  // A micro-batch passes one of the stages that a rank holds.
  StageWeights passed = weights;
  passed.layers /= l.stage_copies();
  passed.moe_layers /= l.stage_copies();
  const double micro = num_micro_batches(l, w);
  add_tensor(m, l, w, c, passed, lines);
  add_context(m, l, w, c, passed.layers, lines);
  add_experts(m, l, w, c, passed.moe_layers, lines);
  if (l.pp > 1) {
    const int stride = l.tp * l.cp * l.dp;
    const double bytes = 2.0 * l.micro_batch * w.seq_len / l.cp * static_cast<double>(m.hidden) /
                         (s.split_pipeline_sends || l.sequence_parallel ? l.tp : 1);
    lines.push_back({"send", "hidden states forward (the next stage's gradients come back)", "pp", l.pp,
                     stride >= c.fast_domain, bytes, micro * l.virtual_stages});
  }
  add_data(l, c, s, weights, micro, lines);
  return lines;
}

std::string format_traffic(const std::vector<TrafficLine>& lines) {
  std::string text = fmt::format(
      "What a rank of the first stage sends in a step\n  {:<28}{:<8}{:>6}  {:<6}{:>14}{:>10}{:>14}  {}\n",
      "operation", "axes", "ranks", "link", "each", "times", "per step", "what");
  double fast = 0.0;
  double slow = 0.0;
  for (const TrafficLine& line : lines) {
    text += fmt::format("  {:<28}{:<8}{:>6}  {:<6}{:>14}{:>10.0f}{:>14}  {}\n", line.operation, line.axes,
                        line.ranks, line.slow_link ? "slow" : "fast", format_bytes(line.bytes_per_use),
                        line.uses, format_bytes(line.bytes()), line.purpose);
    (line.slow_link ? slow : fast) += line.bytes();
  }
  return text + fmt::format("  sum: {} over fast links, {} by groups that span domains\n", format_bytes(fast),
                            format_bytes(slow));
}

std::vector<ExchangeShare> exchange_shares(const ModelSpec& m, const Layout& base, const Workload& w,
                                           const Cluster& c, const Stack& s) {
  std::vector<ExchangeShare> all;
  const auto add = [&](const char* name, const ModelSpec& model, const Layout& l, const Stack& stack,
                       bool hidden) {
    const StepTime exposed = step_time(model, l, w, c, stack);
    all.push_back({name, l.ep,
                   hidden ? exposed.busy[Part::kExpertComm] / exposed.step_s : exposed.expert_comm_share(),
                   exposed.step_s});
  };
  Layout l = base;
  l.dispatcher = Dispatcher::kAllToAll;
  add("a row per (token, expert)", m, l, s, false);
  if (l.ep == 1) return all;
  l.dispatcher = Dispatcher::kPadded;
  add("the same, padded to the largest pair", m, l, s, false);
  l.dispatcher = Dispatcher::kDeduplicated;
  add("a row per (token, rank)", m, l, s, false);
  l.dispatcher = Dispatcher::kHierarchical;
  add("two levels: a row per (token, domain)", m, l, s, false);
  const int domains = std::max(1, l.ep * l.etp / c.fast_domain);
  if (domains > 2) {
    ModelSpec limited = m;
    limited.routing_groups = domains;
    limited.routing_top_groups = std::max(2, domains / 2);
    add("two levels, routing limited to half the domains", limited, l, s, false);
    limited.routing_top_groups = 1;
    add("two levels, a token's experts placed in one domain", limited, l, s, false);
  }
  Stack overlapped = s;
  overlapped.expert_overlap = 0.8;
  l.dispatcher = Dispatcher::kHierarchical;
  add("two levels, four fifths hidden behind computation", m, l, overlapped, true);
  return all;
}

}  // namespace collegium::plan
