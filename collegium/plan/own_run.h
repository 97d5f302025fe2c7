// SPDX-License-Identifier: Apache-2.0
#pragma once

// What `collegium train` itself will do, predicted before it does: bytes of every dispatch and combine,
// memory of a rank, seconds of a step. A plain description, so that neither side needs the other's types.

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "collegium/plan/cluster.h"
#include "collegium/plan/memory.h"
#include "collegium/plan/model_spec.h"
#include "collegium/plan/routing_counts.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

/// How rows reach their experts, as the run file names it.
enum class Exchange { kUneven, kPadded, kAllgather, kTwoLevel, kSharedMemory };

/// A training run: all ranks are data parallel, `ep` of them share the experts of a layer.
struct OwnRun {
  ModelSpec model;
  std::string dtype = "bfloat16";  ///< compute dtype: bfloat16 (fp32 masters), float32 or float64
  int ranks = 1;
  int ep = 1;
  std::vector<int> node_of_rank;  ///< which machine each rank is on; empty = all on one
  Exchange exchange = Exchange::kUneven;
  bool combine_fp32 = false;  ///< two_level, allgather: partial sums travel in fp32
  std::int64_t chunks = 1;    ///< tokens travel in this many chunks
  bool recompute = false;
  bool clipped_qkv = false;              ///< projections are clipped, which keeps them a second time
  bool kept_logits = false;              ///< of routers, beside the scores: sigmoid and noisy top-K
  std::int64_t loss_tokens = 1024;       ///< whose logits exist at one time
  std::int64_t attention_queries = 128;  ///< whose scores are computed as one block
  bool widened_products = false;         ///< bfloat16 without the instructions: multiplied in fp32
  double overlap = 0.0;                  ///< share of the exchange that runs beside computation
  std::int64_t sequence_length = 512;
  std::int64_t global_batch = 8;     ///< sequences of an optimizer step
  std::int64_t micro_sequences = 8;  ///< sequences of a micro-step, over all ranks
  std::int64_t group_sequences = 1;  ///< sequences that stay on one rank together
  /// Rows that an expert takes of a group at most, and that padded blocks hold at least; -1 = any.
  std::int64_t capacity_rows = -1;
};

/// Sent by one rank.
struct SentBytes {
  double within_nodes = 0.0;
  double between_nodes = 0.0;
  double total() const { return within_nodes + between_nodes; }
  bool operator==(const SentBytes&) const = default;
  SentBytes& operator+=(const SentBytes& other) {
    within_nodes += other.within_nodes;
    between_nodes += other.between_nodes;
    return *this;
  }
};
/// Dispatch, combine, combine backward, dispatch backward: the four phases of the ledger.
using ArrowBytes = std::array<SentBytes, 4>;

/// What     What each rank of one expert-parallel group sends for one layer and micro-step, nothing
///          dropped.
/// Math     uneven: the rows of experts elsewhere, and their weights (dispatch and its backward). padded:
///          blocks of the largest count of any (rank, expert), per chunk. allgather: every token to every
///          rank. two_level: a copy per (token, other node), then one per (token, rank with any of its
///          experts) inside, with the weights of its (token, expert) pairs. shared_memory: nothing but 8
///          bytes per chunk and kind of rows or weights that ranks meet over. Weights and, on demand, sums
///          are fp32 (float64 for float64).
/// Throws   ConfigError when there are not `ep` ranks, or an expert does not exist.
std::vector<ArrowBytes> layer_bytes(const OwnRun& run,
                                    const std::vector<std::span<const std::int32_t>>& ids_TK,
                                    int first_rank = 0);

/// What     What each rank sends in the recorded step: exact, from the choices of every layer and micro-step.
/// Throws   ConfigError: no such step, or records whose tokens, choices or experts are not the run's.
std::vector<ArrowBytes> recorded_step_bytes(const OwnRun& run, const RoutingCounts& recorded,
                                            std::int64_t step);
/// What     The expectation of a step's bytes when every token chooses its experts uniformly; padded blocks
///          hold the mean count. Exact for allgather.
std::vector<ArrowBytes> expected_step_bytes(const OwnRun& run);

/// Bytes that a rank's forward pass keeps, per token.
struct OwnActivations {
  double layers = 0.0;      ///< of all layers
  double recomputed = 0.0;  ///< of all layers when they are computed again: inputs, and what routers chose
  double outside = 0.0;     ///< of all layers: final norm, the loss's gradient, ids
  double backward = 0.0;    ///< largest extra of one layer's backward pass
};
/// What     The tensors that `model` and `moe` save for the backward pass, per token; `imbalance` as below.
///          Exact for the options that change no shape; a capacity that drops rows makes it an upper bound.
OwnActivations own_activations(const OwnRun& run, double imbalance = 1.0);

/// Bytes of the tensors of one rank.
struct OwnTensors {
  double weights = 0.0;
  double gradients = 0.0;    ///< sums, in the masters' dtype
  double optimizer = 0.0;    ///< moments, and masters where weights are narrower
  double activations = 0.0;  ///< of a micro-step
  double transient = 0.0;    ///< the larger of a chunk's logits and one layer's backward pass
  double total() const { return weights + gradients + optimizer + activations + transient; }
};
/// What     Tensors of the fullest rank.
OwnTensors own_tensors(const OwnRun& run, double imbalance = 1.0);

/// What     Memory of the fullest rank: own_tensors() and the program. `imbalance` is the fullest rank's
///          rows over the mean.
MemoryReport own_memory(const OwnRun& run, const Cluster& cluster, double imbalance = 1.0);
/// What     Seconds of an optimizer step on a cluster whose ranks are the run's.
StepTime own_step(const OwnRun& run, const Cluster& cluster, double imbalance = 1.0);
/// What     Seconds of it in which ranks compute: passes and the optimizer, no communication.
double computation_seconds(const StepTime& step);
/// What     The layout, the workload and the habits of the software that the two above use.
Layout own_layout(const OwnRun& run);
Workload own_workload(const OwnRun& run, double imbalance);
Stack own_stack(const OwnRun& run);

}  // namespace collegium::plan

namespace collegium {
template <>
struct EnumNames<plan::Exchange> {
  static constexpr std::pair<std::string_view, plan::Exchange> names[] = {
      {"uneven", plan::Exchange::kUneven},
      {"padded", plan::Exchange::kPadded},
      {"allgather", plan::Exchange::kAllgather},
      {"two_level", plan::Exchange::kTwoLevel},
      {"shared_memory", plan::Exchange::kSharedMemory}};
};
}  // namespace collegium
