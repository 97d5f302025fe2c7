// SPDX-License-Identifier: Apache-2.0
// What the simulator reads (durations of a layout's chunks, skewed routing) and writes (traces, pictures).
#include <algorithm>
#include <cmath>
#include <memory>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/plan/collectives.h"
#include "collegium/plan/simulator.h"

namespace collegium::plan {

namespace {

// Seconds of one chunk's passes, the part that grows with routing imbalance apart.
struct ChunkSeconds {
  double forward = 0.0;
  double forward_experts = 0.0;
  double backward = 0.0;
  double backward_experts = 0.0;
};

struct LayoutSeconds {
  std::vector<ChunkSeconds> chunks;
  int experts = 0;
  int ep = 1;
  RoutingSkew skew;
  bool split = false;

  double imbalance(const Task& t) const {
    if (skew.recorded) {
      // Micro-batches and chunks take the records in turn: as many different ones as the file has.
      const auto turn =
          static_cast<std::size_t>(t.micro_batch) * chunks.size() + static_cast<std::size_t>(t.chunk);
      const auto& records = skew.recorded->records;
      return rank_imbalance(records[turn % records.size()].counts_E, ep);
    }
    const auto draw = static_cast<std::uint64_t>(t.micro_batch) * 4096U + static_cast<std::uint64_t>(t.chunk);
    return skewed_imbalance(experts, ep, skew.deviation, skew.seed, draw);
  }
  double scaled(double seconds, double experts_s, const Task& t) const {
    if (experts == 0 || (skew.deviation <= 0.0 && !skew.recorded)) return seconds;
    return seconds + experts_s * (imbalance(t) - 1.0);
  }
  const ChunkSeconds& of(const Task& t) const { return chunks.at(static_cast<std::size_t>(t.chunk)); }
};

// The share of a MoE layer that waits for the fullest rank: its exchange, and products of the routed experts.
double expert_seconds(const ModelSpec& m, const Cost& pass) {
  const LayerWeights w = layer_weights(m, m.layers - 1);
  const double active = static_cast<double>(w.expert) * m.experts_per_token();
  const double share = active / (active + static_cast<double>(w.attention() + w.dense()));
  return pass[Part::kExpertComm] + share * pass[Part::kGemm];
}

ChunkSeconds chunk_seconds(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c,
                           const Stack& s, int chunk) {
  // Chunks are the stages of a pipeline of as many ranks: a rank's together hold what step_time() gives it.
  Layout unfolded = l;
  unfolded.pp = l.pp * l.virtual_stages;
  const StageContent content = stage_content(m, unfolded, s, chunk);
  ChunkSeconds sum;
  const auto add = [&](const LayerCost& cost, double times, bool moe) {
    sum.forward += times * cost.forward.total();
    sum.backward += times * (cost.backward.total() + cost.recompute.total());
    if (!moe) return;
    sum.forward_experts += times * expert_seconds(m, cost.forward);
    sum.backward_experts += times * (expert_seconds(m, cost.backward) + expert_seconds(m, cost.recompute));
  };
  for (const std::size_t moe : {0U, 1U}) {
    for (const std::size_t windowed : {0U, 1U}) {
      const double times = content.layers.at(moe).at(windowed);
      if (times > 0.0) add(layer_cost(m, l, w, c, s, moe == 1, windowed == 1), times, moe == 1);
    }
  }
  if (content.heads > 0.0) add(head_cost(m, l, w, c, s), content.heads, false);
  return sum;
}

}  // namespace

double skewed_imbalance(int experts, int ranks, double skew, std::uint64_t seed, std::uint64_t draw) {
  const RandomStream stream(seed, "plan/skew", draw);
  std::vector<double> normals;
  for (int e = 0; e < experts; ++e) normals.push_back(stream.normal(static_cast<std::uint64_t>(e)));
  const double most = *std::max_element(normals.begin(), normals.end());
  std::vector<double> load(static_cast<std::size_t>(ranks), 0.0);
  double total = 0.0;
  for (int e = 0; e < experts; ++e) {
    // Relative to the most popular one, whose own is 1: no skew is too large for a double.
    const double popularity = std::exp(skew * (normals[static_cast<std::size_t>(e)] - most));
    load[static_cast<std::size_t>(static_cast<long>(e) * ranks / experts)] += popularity;
    total += popularity;
  }
  return *std::max_element(load.begin(), load.end()) * ranks / total;
}

Durations layout_durations(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c,
                           const Stack& s, const RoutingSkew& skew) {
  if (skew.recorded)
    require_config(skew.recorded->experts == m.experts, "recorded routing has {} experts, {} has {}",
                   skew.recorded->experts, m.name, m.experts);
  auto table = std::make_shared<LayoutSeconds>();
  table->experts = static_cast<int>(m.experts);
  table->ep = l.ep;
  table->skew = skew;
  table->split = splits_backward(l.schedule);
  for (int chunk = 0; chunk < l.pp * l.virtual_stages; ++chunk)
    table->chunks.push_back(chunk_seconds(m, l, w, c, s, chunk));
  Durations d;
  d.forward = [table](const Task& t) {
    return table->scaled(table->of(t).forward, table->of(t).forward_experts, t);
  };
  d.backward = [table](const Task& t) {
    const double seconds = table->scaled(table->of(t).backward, table->of(t).backward_experts, t);
    return table->split ? seconds / 2.0 : seconds;
  };
  d.weights = [table](const Task& t) {
    return table->scaled(table->of(t).backward, table->of(t).backward_experts, t) / 2.0;
  };
  if (l.pp > 1) {
    const double bytes = 2.0 * l.micro_batch * w.seq_len / l.cp * static_cast<double>(m.hidden);
    d.send_s = send_seconds(c, l.tp * l.cp * l.dp, bytes / l.tp);
  }
  return d;
}

std::string trace_json(const Simulation& simulation) {
  constexpr double kMicroseconds = 1e6;
  Json events = Json::array();
  for (std::size_t rank = 0; rank < simulation.busy_s.size(); ++rank)
    events.push_back({{"name", "process_name"},
                      {"ph", "M"},
                      {"pid", rank},
                      {"args", {{"name", fmt::format("stage {}", rank)}}}});
  for (const Span& span : simulation.spans) {
    const char* pass = span.task.pass == Pass::kForward
                           ? "forward"
                           : (span.task.pass == Pass::kBackward ? "backward" : "weights");
    events.push_back({{"name", fmt::format("{} {}", pass, span.task.micro_batch)},
                      {"cat", pass},
                      {"ph", "X"},
                      {"pid", span.rank},
                      {"tid", 0},
                      {"ts", span.start_s * kMicroseconds},
                      {"dur", (span.end_s - span.start_s) * kMicroseconds},
                      {"args", {{"micro_batch", span.task.micro_batch}, {"chunk", span.task.chunk}}}});
  }
  return Json({{"displayTimeUnit", "ms"}, {"traceEvents", events}}).dump();
}

std::string timeline_picture(const Simulation& simulation, std::size_t width) {
  std::vector<std::string> lines(simulation.busy_s.size(), std::string(width, '.'));
  for (const Span& span : simulation.spans) {
    const auto column = [&](double time) {
      return std::min(width, static_cast<std::size_t>(
                                 std::lround(time / simulation.makespan_s * static_cast<double>(width))));
    };
    const int micro = span.task.micro_batch;
    char mark = '+';
    if (span.task.pass == Pass::kForward) mark = static_cast<char>('0' + micro % 10);
    if (span.task.pass == Pass::kBackward) mark = static_cast<char>('a' + micro % 26);
    std::string& line = lines[static_cast<std::size_t>(span.rank)];
    for (std::size_t i = column(span.start_s); i < column(span.end_s); ++i) line[i] = mark;
  }
  std::string text;
  for (std::size_t rank = 0; rank < lines.size(); ++rank)
    text += fmt::format("  stage {:>3} |{}|\n", rank, lines[rank]);
  return text;
}

}  // namespace collegium::plan
