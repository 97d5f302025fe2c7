// SPDX-License-Identifier: Apache-2.0
#pragma once

// A discrete-event simulation of one optimizer step's pipeline: when every rank runs which pass, how long it
// idles, how many chunks it holds at most.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "collegium/plan/routing_counts.h"
#include "collegium/plan/schedule.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

/// Seconds of each pass; called once per task, so that stages and micro-batches may differ.
struct Durations {
  std::function<double(const Task&)> forward;
  std::function<double(const Task&)> backward;  ///< input gradients; weight gradients too when not split
  std::function<double(const Task&)> weights;   ///< weight gradients, when the schedule splits them
  double send_s = 0.0;                          ///< from one chunk to the next
};

struct Span {
  int rank = 0;
  double start_s = 0.0;
  double end_s = 0.0;
  Task task;
};

struct Simulation {
  double makespan_s = 0.0;
  std::vector<double> busy_s;    ///< per rank
  std::vector<int> peak_chunks;  ///< per rank: chunks held between forward and backward at most
  std::vector<Span> spans;       ///< in order of their start
  double bubble_share() const;   ///< idle time of all ranks over their makespans
};

/// What     Runs the pipeline. Fixed orders wait for their next task; rule-based ranks take, of what is
///          ready, backward before forward before weight gradients, and hold at most the chunks that the
///          schedule allows.
/// Throws   InternalError if no task can start although some are left, or a duration is negative or not a
///          number.
Simulation simulate(const Pipeline& pipeline, const Durations& durations);

/// Where routing skew comes from: a distribution of popularities, or the routing recorded in a run.
struct RoutingSkew {
  double deviation = 0.0;  ///< an expert's popularity is exp(deviation * normal); 0 = balanced
  std::uint64_t seed = 0;
  std::shared_ptr<const RoutingCounts> recorded;  ///< taken in turn, record by record, where given
};
/// What     The durations of a layout's stages: each micro-batch's expert work is multiplied by the fullest
///          rank's tokens over the mean.
/// Throws   ConfigError when the recorded experts are not the model's.
Durations layout_durations(const ModelSpec& model, const Layout& layout, const Workload& work,
                           const Cluster& cluster, const Stack& stack, const RoutingSkew& skew);
/// What     The fullest of `ranks` ranks' tokens over the mean, when expert e is chosen in proportion to
///          exp(skew * n_e).
double skewed_imbalance(int experts, int ranks, double skew, std::uint64_t seed, std::uint64_t draw);

/// What     The spans as a Chrome/Perfetto trace: one process per rank, microseconds.
std::string trace_json(const Simulation& simulation);
/// What     Ranks as lines, time to the right: digits are forward passes, letters backward, + weight
///          gradients.
std::string timeline_picture(const Simulation& simulation, std::size_t width);

}  // namespace collegium::plan
