// SPDX-License-Identifier: Apache-2.0
#pragma once

// The order in which pipeline ranks run forward and backward passes: fixed orders for GPipe, 1F1B and
// interleaving, rules for zero-bubble and DualPipe, which fill idle time with whatever is ready.

#include <cstdint>
#include <vector>

#include "collegium/plan/layout.h"

namespace collegium::plan {

/// kBackward computes input gradients, and weight gradients too unless the schedule splits them off.
enum class Pass { kForward, kBackward, kWeights };

/// What     Whether weight gradients are tasks of their own.
bool splits_backward(Schedule schedule);

/// One pass of one micro-batch through one chunk of layers.
struct Task {
  Pass pass = Pass::kForward;
  int micro_batch = 0;
  int chunk =
      0;  ///< position in the model's order, from 0; DualPipe: from 0 in the micro-batch's own direction
};

/// A pipeline: ranks, chunks per rank, micro-batches.
struct Pipeline {
  Schedule schedule = Schedule::k1F1B;
  int ranks = 1;
  int virtual_stages = 1;
  int micro_batches = 1;

  int chunks() const { return ranks * virtual_stages; }
  /// The rank that holds a chunk; DualPipe's second half of the micro-batches enters at the last rank.
  int rank_of(const Task& task) const;
  bool splits_backward() const { return plan::splits_backward(schedule); }
  int direction_of(const Task& task) const;  ///< 1 for micro-batches that DualPipe sends in at the last rank
  /// Micro-batches of one direction that a rule-based rank may hold at a chunk between forward and backward:
  /// 1F1B's depth. DualPipe's two directions together hold (ranks - c) + (c + 1) = ranks + 1.
  int most_in_flight(const Task& task) const { return ranks - task.chunk; }
};

/// What     Per rank the fixed order of its tasks; empty for rule-based schedules (zero-bubble, DualPipe).
/// Throws   ConfigError when interleaving does not divide the micro-batches by the ranks, or DualPipe meets
///          odd numbers.
std::vector<std::vector<Task>> fixed_order(const Pipeline& pipeline);

}  // namespace collegium::plan
