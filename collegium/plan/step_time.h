// SPDX-License-Identifier: Apache-2.0
#pragma once

// Seconds of an optimizer step: kernels by roofline, collectives on the layout's groups, the pipeline's
// bubble, the gradient reduction behind the backward pass, the optimizer.

#include <array>
#include <string>
#include <vector>

#include "collegium/plan/cluster.h"
#include "collegium/plan/layout.h"
#include "collegium/plan/memory.h"
#include "collegium/plan/model_spec.h"

namespace collegium::plan {

/// Where seconds go.
enum class Part { kGemm, kAttention, kElementwise, kTensorComm, kExpertComm };
constexpr std::size_t kNumParts = 5;
/// What     "matrix products", "attention", "element-wise", "tensor collectives", "expert exchange".
std::string_view part_name(Part part);

/// Seconds by part; comm parts already without what the stack hides.
struct Cost {
  std::array<double, kNumParts> seconds{};
  double total() const;
  double& operator[](Part part) { return seconds.at(static_cast<std::size_t>(part)); }
  double operator[](Part part) const { return seconds.at(static_cast<std::size_t>(part)); }
  Cost& add(const Cost& other, double times = 1.0);
};

/// Forward, backward (without recomputation) and recomputation of one layer for one micro-batch on one rank.
struct LayerCost {
  Cost forward;
  Cost backward;
  Cost recompute;
};
/// What     Blocks of a layer that tensor-parallel ranks share, each with a reduction per pass: attention,
///          and a dense or shared network; experts are reached by dispatch.
double tensor_blocks(const ModelSpec& model, bool moe);
/// What     Cost of a layer with experts or with a dense network; `windowed` layers see at most the
///          window's keys.
LayerCost layer_cost(const ModelSpec& model, const Layout& layout, const Workload& work,
                     const Cluster& cluster, const Stack& stack, bool moe, bool windowed);
/// What     Cost of the output head and loss of one micro-batch.
LayerCost head_cost(const ModelSpec& model, const Layout& layout, const Workload& work,
                    const Cluster& cluster, const Stack& stack);

/// What a stage runs for a micro-batch.
struct StageContent {
  /// Layers with a dense network and with experts; of each those that see all keys, and windowed ones.
  std::array<std::array<double, 2>, 2> layers{};
  double heads = 0.0;  ///< passes through the output head
};
/// What     Content of a stage: the layers of stage_layers(), on the last one the head and the prediction
///          layers, each with a pass through the head too.
StageContent stage_content(const ModelSpec& model, const Layout& layout, const Stack& stack, int stage);

/// What     Seconds of an optimizer step.
/// Math     step = m * slowest stage + (pp - 1)/v * mean stage + sends + exposed reduction + optimizer; the
///          slowest stage's share that does not fit the mean is its imbalance.
struct StepTime {
  Cost busy;  ///< the mean stage's work of all micro-batches, by part
  double micro_batches = 0.0;
  double forward_s = 0.0;   ///< of one micro-batch on the slowest stage
  double backward_s = 0.0;  ///< the same, recomputation included
  double stage_imbalance_s = 0.0;
  double bubble_s = 0.0;
  double pipeline_comm_s = 0.0;
  double data_comm_s = 0.0;  ///< exposed gradient reduction and weight gathering
  double optimizer_s = 0.0;
  double step_s = 0.0;
  double expert_comm_s = 0.0;  ///< dispatch and combine, hidden or not
  double expert_comm_share() const { return step_s > 0.0 ? expert_comm_s / step_s : 0.0; }
};
/// What     The step's seconds by cause.
StepTime step_time(const ModelSpec& model, const Layout& layout, const Workload& work, const Cluster& cluster,
                   const Stack& stack);

/// What     Model FLOP/s per accelerator in FLOP/s: 3 x forward FLOPs of all tokens over time and ranks.
double model_flops_per_s(const ModelSpec& model, const Layout& layout, const Workload& work, double step_s);

/// What     Share of a pipeline's time that its schedule leaves idle, in units of one micro-batch's work.
/// Math     GPipe, 1F1B: pp - 1; interleaved: (pp - 1)/v; zero-bubble: (pp - 1)(F + B - 2W)/(F + B);
///          DualPipe: (pp/2 - 1)(F + 2B - 3W)/(F + B); F forward, B the whole backward pass, W its half for
///          weights.
/// Ref      [DeepSeekV3, Table 2]
double bubble_micro_batches(const Layout& layout, double forward_s, double backward_s);

/// What     The parts as a table and a bar.
std::string format_step(const StepTime& time);

}  // namespace collegium::plan
