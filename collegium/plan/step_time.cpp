// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/step_time.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "collegium/plan/account.h"
#include "collegium/plan/collectives.h"

namespace collegium::plan {

std::string_view part_name(Part part) {
  constexpr std::array<std::string_view, kNumParts> kNames = {"matrix products", "attention", "element-wise",
                                                              "tensor collectives", "expert exchange"};
  return kNames.at(static_cast<std::size_t>(part));
}

double Cost::total() const { return std::accumulate(seconds.begin(), seconds.end(), 0.0); }

Cost& Cost::add(const Cost& other, double times) {
  for (std::size_t i = 0; i < kNumParts; ++i) seconds.at(i) += times * other.seconds.at(i);
  return *this;
}

double bubble_micro_batches(const Layout& l, double forward_s, double backward_s) {
  const double total = forward_s + backward_s;
  if (l.pp == 1 || total <= 0.0) return 0.0;
  // The backward pass is half for inputs, half for weights.
  const double half = backward_s / 2.0;
  switch (l.schedule) {
    case Schedule::kGPipe:
    case Schedule::k1F1B:
    case Schedule::kInterleaved:
      break;
    case Schedule::kZeroBubble:
      return (l.pp - 1.0) * std::max(0.0, forward_s + backward_s - 2.0 * half) / total;
    case Schedule::kDualPipe:
      return (l.pp / 2.0 - 1.0) * std::max(0.0, total + backward_s - 3.0 * half) / total;
  }
  return (l.pp - 1.0) / l.virtual_stages;
}

namespace {

// A share of a layer that no stage is given a layer less for.
constexpr double kWholeLayer = 0.1;

struct LayerKind {
  std::size_t moe = 0;
  std::size_t windowed = 0;
};

LayerKind kind_of(const ModelSpec& m, std::int64_t layer) {
  const auto at = static_cast<std::size_t>(layer);
  return {.moe = m.is_moe() && m.moe_layers.at(at) ? 1U : 0U,
          .windowed = !m.window_layers.empty() && m.window_layers.at(at) ? 1U : 0U};
}

}  // namespace

StageContent stage_content(const ModelSpec& m, const Layout& l, const Stack& s, int stage) {
  StageContent content;
  const auto add = [&](std::int64_t layer, double times) {
    const LayerKind kind = kind_of(m, layer);
    content.layers.at(kind.moe).at(kind.windowed) += times;
  };
  const auto [first, last] = stage_layers(m, l, s, stage);
  for (std::int64_t layer = first; layer < last; ++layer) add(layer, 1.0);
  if (stage < l.pp - 1) return content;
  content.heads = 1.0 + static_cast<double>(m.mtp_layers);
  add(m.layers - 1, static_cast<double>(m.mtp_layers));
  return content;
}

namespace {

void add_cost(LayerCost& sum, const LayerCost& cost, double times) {
  sum.forward.add(cost.forward, times);
  sum.backward.add(cost.backward, times);
  sum.recompute.add(cost.recompute, times);
}

class Stages {
 public:
  Stages(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c, const Stack& s)
      : m_(m), l_(l), w_(w), c_(c), s_(s), head_(head_cost(m, l, w, c, s)) {}

  const LayerCost& layer(LayerKind kind) {
    std::optional<LayerCost>& cost = costs_.at(kind.moe).at(kind.windowed);
    if (!cost) cost = layer_cost(m_, l_, w_, c_, s_, kind.moe == 1, kind.windowed == 1);
    return *cost;
  }

  // A micro-batch's passes on a rank: the mean of the stages that it holds, which share the micro-batches.
  LayerCost rank(int index) {
    const std::vector<int> held = held_stages(l_, index);
    LayerCost mean;
    for (const int stage : held) add_stage(stage, 1.0 / static_cast<double>(held.size()), mean);
    return mean;
  }

 private:
  void add_stage(int index, double share, LayerCost& sum) {
    const StageContent content = stage_content(m_, l_, s_, index);
    for (const std::size_t moe : {0U, 1U}) {
      for (const std::size_t windowed : {0U, 1U}) {
        const double times = content.layers.at(moe).at(windowed);
        if (times > 0.0) add_cost(sum, layer({.moe = moe, .windowed = windowed}), share * times);
      }
    }
    // Every micro-batch reads and writes the accumulated gradients, after writing and reading its own.
    if (!s_.fused_accumulation && num_micro_batches(l_, w_) > 1.0) {
      const StageWeights held = stage_weights(m_, l_, s_, index);
      sum.backward[Part::kElementwise] +=
          share * update_seconds(c_.accelerator,
                                 2.0 * (s_.gradient_bytes + s_.weight_bytes) * (held.dense + held.experts));
    }
    if (content.heads > 0.0) add_cost(sum, head_, share * content.heads);
  }

  const ModelSpec& m_;
  const Layout& l_;
  const Workload& w_;
  const Cluster& c_;
  const Stack& s_;
  LayerCost head_;
  std::array<std::array<std::optional<LayerCost>, 2>, 2> costs_;  // by kind, computed once
};

double seconds_of(const LayerCost& cost) {
  return cost.forward.total() + cost.backward.total() + cost.recompute.total();
}

// Work that the stack hides behind other work leaves the critical path; the exchange itself is still
// reported.
void hide_expert_comm(LayerCost& cost, double overlap) {
  for (Cost* c : {&cost.forward, &cost.backward, &cost.recompute}) {
    const double compute = c->total() - (*c)[Part::kExpertComm];
    (*c)[Part::kExpertComm] -= std::min((*c)[Part::kExpertComm] * overlap, compute);
  }
}

// Sends between stages: activations forward and gradients backward, each micro-batch and virtual stage.
double send_time(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c, const Stack& s) {
  if (l.pp == 1) return 0.0;
  const double tokens = l.micro_batch * w.seq_len / l.cp;
  const double whole = 2.0 * tokens * static_cast<double>(m.hidden);
  const double sent = s.split_pipeline_sends || l.sequence_parallel ? whole / l.tp : whole;
  double seconds = send_seconds(c, l.tp * l.cp * l.dp, sent);
  if (s.split_pipeline_sends && !l.sequence_parallel)
    seconds += gather_seconds(c, group_of(c, l.tp, 1), whole);
  return 2.0 * seconds * l.virtual_stages;
}

// Gradient reduction and weight gathering of plain, ZeRO-1 and ZeRO-2 data parallelism.
struct Reduction {
  double each_s =
      0.0;  // after every micro-batch: who keeps shards of gradients has nowhere to sum whole ones
  double once_s = 0.0;
};

Reduction reduction(const StageWeights& weights, const Layout& l, const Cluster& c, const Stack& s) {
  Reduction r;
  const auto add = [&](const Group& group, double parameters) {
    if (l.zero == Zero::kNone) {
      r.once_s += all_reduce_seconds(c, group, parameters * s.reduce_bytes);
      return;
    }
    (l.zero >= Zero::kGradients ? r.each_s : r.once_s) +=
        gather_seconds(c, group, parameters * s.reduce_bytes);
    r.once_s += gather_seconds(c, group, parameters * s.weight_bytes);
  };
  add(replica_group(c, l), weights.dense);
  add(expert_replica_group(c, l), weights.experts);
  return r;
}

// What of it the backward pass of the micro-batch before does not cover.
double exposed_seconds(const Reduction& r, double micro_batches, double work_s, const Stack& s) {
  const auto exposed = [&](double seconds) {
    return seconds - std::min(seconds * s.data_overlap, work_s / micro_batches);
  };
  return (micro_batches - 1.0) * exposed(r.each_s) + exposed(r.each_s + r.once_s);
}

// Fully sharded: weights are gathered for the forward and again for the backward pass of every micro-batch,
// gradients scattered after each; the stack hides what computation can cover.
double sharded_seconds(const StageWeights& weights, const Layout& l, const Cluster& c, const Stack& s) {
  Group dense = replica_group(c, l);
  Group expert = expert_replica_group(c, l);
  if (s.one_ring_gathers) dense.in_domain = expert.in_domain = 1.0;
  const auto one = [&](const Group& group, double parameters) {
    return 2.0 * gather_seconds(c, group, parameters * s.weight_bytes) +
           gather_seconds(c, group, parameters * s.reduce_bytes);
  };
  return one(dense, weights.dense) + one(expert, weights.experts);
}

// What the slowest stage does beyond the mean when stages are arranged by work: up to a whole layer.
double arranged_excess(const ModelSpec& m, const Layout& l, const Stack& s, Stages& stages, double mean_s) {
  if (s.balanced_stages) return 0.0;
  if (!s.arranges_stages || l.pp == 1) return std::numeric_limits<double>::infinity();
  const double layer = seconds_of(stages.layer(kind_of(m, m.layers - 1)));
  return std::max(0.0, std::ceil(mean_s / layer - kWholeLayer) * layer - mean_s);
}

double optimizer_seconds(const StageWeights& weights, const Layout& l, const Cluster& c, const Stack& s) {
  const bool sharded = l.zero != Zero::kNone;
  const double dense = weights.dense / (sharded ? l.replicas() : 1.0);
  const double experts = weights.experts / (sharded ? l.expert_replicas() : 1.0);
  // Gradient read (twice: norm, update), master weight and moments read and written, low-precision weight
  // written.
  const double bytes = 2.0 * s.gradient_bytes + 2.0 * s.optimizer_bytes + s.weight_bytes;
  return update_seconds(c.accelerator, (dense + experts) * bytes);
}

}  // namespace

StepTime step_time(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c, const Stack& s) {
  Stages stages(m, l, w, c, s);
  StepTime t;
  t.micro_batches = num_micro_batches(l, w);
  LayerCost mean;
  double slowest = 0.0;
  double backward_of_slowest = 0.0;
  for (int stage = 0; stage < l.pp; ++stage) {
    LayerCost cost = stages.rank(stage);
    for (const Cost* part : {&cost.forward, &cost.backward, &cost.recompute})
      t.expert_comm_s += (*part)[Part::kExpertComm] * t.micro_batches / l.pp;
    // Dispatch of one chunk hides behind another chunk's work: in a pipeline that takes virtual stages.
    hide_expert_comm(cost, l.pp == 1 || l.virtual_stages > 1 ? s.expert_overlap : 0.0);
    mean.forward.add(cost.forward, 1.0 / l.pp);
    mean.backward.add(cost.backward, 1.0 / l.pp);
    mean.recompute.add(cost.recompute, 1.0 / l.pp);
    if (seconds_of(cost) > slowest) {
      slowest = seconds_of(cost);
      t.forward_s = cost.forward.total();
      backward_of_slowest = slowest - t.forward_s;
    }
  }
  t.backward_s = backward_of_slowest;
  for (const Cost* part : {&mean.forward, &mean.backward, &mean.recompute})
    t.busy.add(*part, t.micro_batches);
  const double mean_s = seconds_of(mean);
  t.stage_imbalance_s =
      t.micro_batches * std::min(slowest - mean_s, arranged_excess(m, l, s, stages, mean_s));
  t.bubble_s = bubble_micro_batches(l, mean.forward.total(), mean_s - mean.forward.total()) * mean_s;
  t.pipeline_comm_s = (t.micro_batches + (l.pp - 1.0) / l.virtual_stages) * send_time(m, l, w, c, s);
  const StageWeights weights = held_weights(m, l, s, 0);
  const double work = t.busy.total() + t.stage_imbalance_s;
  if (l.zero == Zero::kSharded) {
    t.data_comm_s =
        std::max(0.0, t.micro_batches * sharded_seconds(weights, l, c, s) - s.sharded_overlap * work);
  } else {
    t.data_comm_s = exposed_seconds(reduction(weights, l, c, s), t.micro_batches, work, s);
  }
  t.optimizer_s = optimizer_seconds(weights, l, c, s);
  t.step_s = work + t.bubble_s + t.pipeline_comm_s + t.data_comm_s + t.optimizer_s;
  return t;
}

double model_flops_per_s(const ModelSpec& m, const Layout& l, const Workload& w, double step_s) {
  return 3.0 * forward_flops_per_token(m, w.seq_len).total() * w.global_batch * w.seq_len /
         (step_s * l.world());
}

}  // namespace collegium::plan
