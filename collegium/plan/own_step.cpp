// SPDX-License-Identifier: Apache-2.0
// Seconds of our own training step.
#include <algorithm>
#include <array>

#include "collegium/base/error.h"
#include "collegium/plan/collectives.h"
#include "collegium/plan/own_run.h"

namespace collegium::plan {

namespace {

// Our attention computes whole blocks of queries, the last of which sees all of the block's keys: S + block
// scores of a query's row where S + 1 are useful.
double useful_scores(double length, double block) {
  return (length + 1.0) / (length + std::min(length, block));
}

constexpr std::array kComputed = {Part::kGemm, Part::kAttention, Part::kElementwise};

// Waits at the end of parallel regions, small operations and fresh memory come on top of what is planned.
void slow_down(StepTime& t, double efficiency) {
  const double planned = computation_seconds(t);
  const double busy = t.busy.total();
  for (const Part part : kComputed) t.busy[part] /= efficiency;
  t.forward_s *= t.busy.total() / busy;
  t.backward_s *= t.busy.total() / busy;
  t.optimizer_s /= efficiency;
  t.step_s += planned / efficiency - planned;
}

// The last micro-step may be shorter than the others.
StepTime passes_and_update(const OwnRun& run, const Workload& work, const Cluster& cluster,
                           const Stack& stack) {
  StepTime t = step_time(run.model, own_layout(run), work, cluster, stack);
  const std::int64_t rest = run.global_batch % run.micro_sequences;
  if (rest == 0) return t;
  OwnRun short_run = run;
  short_run.micro_sequences = rest;
  short_run.global_batch = 2 * rest;  // as of several, whose gradients are summed
  const StepTime s =
      step_time(run.model, own_layout(short_run), own_workload(short_run, work.imbalance), cluster, stack);
  const double before = t.busy.total();
  t.busy.add(t.busy, -1.0 / t.micro_batches).add(s.busy, 1.0 / s.micro_batches);
  t.expert_comm_s += s.expert_comm_s / s.micro_batches - t.expert_comm_s / t.micro_batches;
  t.step_s += t.busy.total() - before;
  return t;
}

}  // namespace

double computation_seconds(const StepTime& t) {
  double seconds = t.optimizer_s;
  for (const Part part : kComputed) seconds += t.busy[part];
  return seconds;
}

Layout own_layout(const OwnRun& run) {
  Layout l;
  l.dp = run.ranks;
  l.ep = run.ep;
  l.zero = Zero::kNone;
  l.sequence_parallel = false;
  l.recompute.full = run.recompute;
  // The fullest rank's share of a micro-step, in sequences.
  const std::int64_t groups = (run.micro_sequences + run.group_sequences - 1) / run.group_sequences;
  l.micro_batch = static_cast<int>((groups + run.ranks - 1) / run.ranks * run.group_sequences);
  switch (run.exchange) {
    case Exchange::kUneven:
      l.dispatcher = Dispatcher::kAllToAll;
      break;
    case Exchange::kPadded:
      l.dispatcher = Dispatcher::kPadded;
      break;
    case Exchange::kAllgather:
      l.dispatcher = Dispatcher::kAllGather;
      break;
    case Exchange::kTwoLevel:
      l.dispatcher = Dispatcher::kHierarchical;
      break;
    case Exchange::kSharedMemory:
      l.dispatcher = Dispatcher::kSharedMemory;
      break;
  }
  return l;
}

Workload own_workload(const OwnRun& run, double imbalance) {
  const std::int64_t micro_steps = (run.global_batch + run.micro_sequences - 1) / run.micro_sequences;
  const Layout l = own_layout(run);
  // As many sequences as make the fullest rank's micro-steps come out.
  return {.seq_len = static_cast<double>(run.sequence_length),
          .global_batch = static_cast<double>(micro_steps) * l.dp * l.micro_batch,
          .precision = run.dtype == "bfloat16" ? "bf16" : "fp32",
          .imbalance = imbalance};
}

Stack own_stack(const OwnRun& run) {
  Stack s;
  const double value = run.dtype == "bfloat16" ? 2.0 : (run.dtype == "float64" ? 8.0 : 4.0);
  const double master = run.dtype == "float64" ? 8.0 : 4.0;
  s.weight_bytes = value;
  s.value_scale = value / 2.0;
  s.gradient_bytes = master;
  // Two moments, and a master where the weights are narrower.
  s.optimizer_bytes = 2.0 * master + (value == master ? 0.0 : master);
  s.reduce_bytes = master;
  s.data_overlap = 0.0;
  s.expert_overlap = run.overlap;
  s.fragmentation = 0.0;
  s.grouped_experts = false;
  s.fused_accumulation = false;
  return s;
}

StepTime own_step(const OwnRun& run, const Cluster& cluster, double imbalance) {
  // Scores are computed in fp32 whatever the dtype: attention is as fast as where it was measured, in bf16.
  Cluster ours = cluster;
  if (run.dtype != "bfloat16") {
    const double ratio = peak_flops(cluster.accelerator, "bf16") / peak_flops(cluster.accelerator, "fp32");
    ours.accelerator.attention_forward *= ratio;
    ours.accelerator.attention_backward *= ratio;
  }
  if (cluster.accelerator.attention_length > 0.0) {
    const auto block = static_cast<double>(run.attention_queries);
    const double useful = useful_scores(static_cast<double>(run.sequence_length), block) /
                          useful_scores(cluster.accelerator.attention_length, block);
    ours.accelerator.attention_forward *= useful;
    ours.accelerator.attention_backward *= useful;
  }
  const Stack stack = own_stack(run);
  StepTime t = passes_and_update(run, own_workload(run, imbalance), ours, stack);
  // The gradients of a lone micro-step are added to the sums too.
  if (t.micro_batches <= 1.0) {
    const StageWeights held = stage_weights(run.model, own_layout(run), stack, 0);
    const double seconds = update_seconds(
        cluster.accelerator, 2.0 * (stack.gradient_bytes + stack.weight_bytes) * (held.dense + held.experts));
    t.optimizer_s += seconds;
    t.step_s += seconds;
  }
  if (cluster.accelerator.step_efficiency > 0.0) slow_down(t, cluster.accelerator.step_efficiency);
  return t;
}

}  // namespace collegium::plan
