// SPDX-License-Identifier: Apache-2.0
#pragma once

// Bytes that a rank holds: weights, gradients, optimizer state, activations, buffers. Worst rank, not the
// mean.

#include <cstdint>
#include <string>
#include <vector>

#include "collegium/plan/cluster.h"
#include "collegium/plan/layout.h"
#include "collegium/plan/model_spec.h"

namespace collegium::plan {

/// What     Driver context and collective buffers, seen by the device only; a CPU has none.
double context_bytes(const Cluster& cluster);

/// Parameters that one rank of a pipeline stage holds, by how their optimizer state is sharded.
struct StageWeights {
  double dense = 0.0;    ///< sharded over Layout::replicas()
  double experts = 0.0;  ///< sharded over Layout::expert_replicas()
  double layers = 0.0;
  double moe_layers = 0.0;
};

/// What     Layers of stage `stage`: [first, last), uniform blocks with the remainder on the first stages,
///          or equal work with embedding and head counted as layers when the stack balances stages.
std::pair<std::int64_t, std::int64_t> stage_layers(const ModelSpec& model, const Layout& layout,
                                                   const Stack& stack, int stage);
/// What     Parameters of a rank of that stage. The vocabulary is padded to a multiple of 128 * tp; tied
///          embeddings have a copy on the first and on the last stage.
StageWeights stage_weights(const ModelSpec& model, const Layout& layout, const Stack& stack, int stage);
/// What     Stages that rank `stage` of a pipeline holds: its own, and under DualPipe the one as far from the
///          other end.
std::vector<int> held_stages(const Layout& layout, int stage);
/// What     Parameters of all stages that the rank holds.
StageWeights held_weights(const ModelSpec& model, const Layout& layout, const Stack& stack, int stage);

/// Bytes of activations that the backward pass needs, per layer and micro-batch, on one rank.
struct LayerActivations {
  double dense = 0.0;    ///< a layer with a dense network
  double moe = 0.0;      ///< a layer with experts
  double working = 0.0;  ///< live only while a layer runs under full recompute: the layer's own activations
};

/// What     Activations of one micro-batch.
/// Math     Per token, in bytes, D hidden, q, kv widths of queries and of keys/values, F width: norms'
///          inputs and outputs 8 D, q, k, v and attention's output 2 (2 q + 2 kv), SwiGLU 6 F (GELU 4 F),
///          dropout masks 2 D; scores 2..5 bytes * H * S where attention is not fused; experts: per row 2 D
///          in, 6 F, and 2 D out; the router 8 E. Tensor parallelism divides all but the first and the
///          masks, sequence parallelism those too.
/// Ref      [Korthikanti2022, Eq 2]
LayerActivations layer_activations(const ModelSpec& model, const Layout& layout, const Workload& work,
                                   const Stack& stack);

/// What     Layer-micro-batches whose activations a stage holds at its peak.
/// Math     1F1B: min(m, pp - stage) * layers; interleaved: min(m * v, 2 (pp - stage - 1) + (v - 1) pp + 1)
///          chunks of layers / v; GPipe: m * layers; zero-bubble: pp * layers; DualPipe: min(m / 2, pp -
///          stage) * layers of each of the two stages held, (pp + 1) * layers where they are equal.
double layers_in_flight(const Layout& layout, double micro_batches, int stage, double stage_layers);

struct MemoryLine {
  std::string component;
  double bytes = 0.0;
};
struct MemoryReport {
  int stage = 0;
  std::vector<MemoryLine> lines;
  void add(const char* component, double bytes) {
    MemoryLine& line = lines.emplace_back();
    line.component = component;
    line.bytes = bytes;
  }
  double static_bytes = 0.0;  ///< weights, gradients, optimizer state, workspaces
  double peak_bytes = 0.0;    ///< what the allocator hands out at most
  double device_bytes = 0.0;  ///< what the device reports: fragmentation and the driver's context on top
};

constexpr double kContextBytes = 1.4e9;  ///< driver context and collective buffers, seen by the device only

/// What     Memory of one stage.
MemoryReport stage_memory(const ModelSpec& model, const Layout& layout, const Workload& work,
                          const Cluster& cluster, const Stack& stack, int stage);
/// What     The stage with the largest peak (first, last, or between).
MemoryReport worst_memory(const ModelSpec& model, const Layout& layout, const Workload& work,
                          const Cluster& cluster, const Stack& stack);
/// What     Whether the device's memory holds the report's peak and the driver's context.
bool fits(const MemoryReport& report, const Cluster& cluster);

/// What     What the model of memory takes for granted, a line each.
std::vector<std::string> memory_assumptions(const Layout& layout, const Workload& work, const Stack& stack);
/// What     The report as a table and a stacked bar against the accelerator's memory.
std::string format_memory(const MemoryReport& report, const Cluster& cluster);

}  // namespace collegium::plan
