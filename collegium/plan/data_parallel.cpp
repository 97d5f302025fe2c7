// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/data_parallel.h"

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/units.h"
#include "collegium/plan/collectives.h"

namespace collegium::plan {

namespace {

// What the parameters of a rank cost to send, dense and expert groups each over their own replicas.
struct Volumes {
  double gradients = 0.0;  ///< all of a rank's
  double weights = 0.0;
  double shared_gradients = 0.0;  ///< times (n - 1)/n
  double shared_weights = 0.0;
};

Volumes volumes(const StageWeights& held, const Layout& l, const Stack& s) {
  Volumes v;
  const auto add = [&](double parameters, double count) {
    if (count <= 1.0) return;
    const double share = (count - 1.0) / count;
    v.gradients += parameters * s.reduce_bytes;
    v.weights += parameters * s.weight_bytes;
    v.shared_gradients += share * parameters * s.reduce_bytes;
    v.shared_weights += share * parameters * s.weight_bytes;
  };
  add(held.dense, l.replicas());
  add(held.experts, l.expert_replicas());
  return v;
}

// Everything passes one server's link, in and then out.
double server_bytes(const Volumes& v, const Layout& l) { return l.replicas() * (v.gradients + v.weights); }

double server_seconds(const Volumes& v, const Layout& l, const Cluster& c) {
  const Link& link = l.world() > c.fast_domain ? c.slow_link : c.fast_link;
  const double bandwidth = link.gb_per_s * 1e9 * link.efficiency;
  return server_bytes(v, l) / bandwidth + 2.0 * link.latency_us * 1e-6;
}

DataParallelVariant variant(const ModelSpec& m, Layout l, Zero zero, const Workload& w, const Cluster& c,
                            const Stack& s) {
  l.zero = zero;
  const StepTime step = step_time(m, l, w, c, s);
  const MemoryReport memory = worst_memory(m, l, w, c, s);
  DataParallelVariant one;
  one.exposed_s = step.data_comm_s;
  one.step_s = step.step_s;
  one.static_bytes = memory.static_bytes;
  one.device_bytes = memory.device_bytes;
  one.fits = fits(memory, c);
  return one;
}

}  // namespace

std::vector<DataParallelVariant> data_parallel_variants(const ModelSpec& m, const Layout& l,
                                                        const Workload& w, const Cluster& c, const Stack& s) {
  require_config(l.replicas() > 1, "data parallelism: dp*cp = {}*{}: there is one replica only", l.dp, l.cp);
  const Volumes v = volumes(held_weights(m, l, s, 0), l, s);
  const double micro = num_micro_batches(l, w);
  std::vector<DataParallelVariant> all;
  const auto add = [&](const char* name, DataParallelVariant one, double sent, double busiest) {
    one.name = name;
    one.sent_bytes = sent;
    one.busiest_bytes = busiest;
    all.push_back(std::move(one));
  };
  const DataParallelVariant whole = variant(m, l, Zero::kNone, w, c, s);
  const double without = whole.step_s - whole.exposed_s;
  const auto behind = [&](double seconds) {
    DataParallelVariant one = whole;
    // What one micro-batch's backward pass covers, as for the collectives.
    one.exposed_s = seconds - std::min(seconds * s.data_overlap, without / micro);
    one.step_s = without + one.exposed_s;
    return one;
  };
  add("parameter server, central", behind(server_seconds(v, l, c)), v.gradients, server_bytes(v, l));
  const DataParallelVariant sharded = variant(m, l, Zero::kOptimizer, w, c, s);
  DataParallelVariant served = whole;
  served.exposed_s = sharded.exposed_s;
  served.step_s = without + sharded.exposed_s;
  const double both = v.shared_gradients + v.shared_weights;
  add("parameter server, a shard on every rank", served, both, both);
  add("all-reduce", whole, 2.0 * v.shared_gradients, 2.0 * v.shared_gradients);
  add("ZeRO 1: optimizer sharded", sharded, both, both);
  const double scattered = micro * v.shared_gradients + v.shared_weights;
  add("ZeRO 2: gradients too", variant(m, l, Zero::kGradients, w, c, s), scattered, scattered);
  const double gathered = micro * (2.0 * v.shared_weights + v.shared_gradients);
  add("ZeRO 3: weights too", variant(m, l, Zero::kSharded, w, c, s), gathered, gathered);
  return all;
}

std::string format_data_parallel(const std::vector<DataParallelVariant>& variants, const Layout& l,
                                 const Cluster& c) {
  std::string text = fmt::format(
      "Data parallelism of {} on {}\n  {:<42}{:>14}{:>14}{:>12}{:>12}{:>12}{:>12}\n", layout_name(l), c.name,
      "variant", "rank sends", "busiest link", "exposed s", "step s", "static GiB", "device GiB");
  for (const DataParallelVariant& v : variants)
    text += fmt::format("  {:<42}{:>14}{:>14}{:>12.4g}{:>12.4g}{:>12.1f}{:>12.1f}{}\n", v.name,
                        format_bytes(v.sent_bytes), format_bytes(v.busiest_bytes), v.exposed_s, v.step_s,
                        v.static_bytes / kGiB, v.device_bytes / kGiB, v.fits ? "" : "  does not fit");
  return text;
}

Json data_parallel_json(const std::vector<DataParallelVariant>& variants) {
  Json list = Json::array();
  for (const DataParallelVariant& v : variants)
    list.push_back({{"variant", v.name},
                    {"sent_bytes", v.sent_bytes},
                    {"busiest_bytes", v.busiest_bytes},
                    {"exposed_s", v.exposed_s},
                    {"step_s", v.step_s},
                    {"static_bytes", v.static_bytes},
                    {"device_bytes", v.device_bytes},
                    {"fits", v.fits}});
  return list;
}

}  // namespace collegium::plan
