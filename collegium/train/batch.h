// SPDX-License-Identifier: Apache-2.0
#pragma once

// From windows of the corpus to the tensors of a micro-step.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "collegium/data/dataset.h"

namespace collegium::train {

/// One rank's part of a micro-step, perhaps of no sequence.
struct MicroBatch {
  std::int64_t first_sequence = 0;  ///< within the optimizer step's global batch
  std::int64_t all_sequences = 0;   ///< of the micro-step, over all ranks
  std::int64_t offset = 0;          ///< of this rank's first sequence within the micro-step
  at::Tensor ids_BS;                ///< int64
  at::Tensor targets_BS;            ///< int64, -100 = no target
  at::Tensor document_ids_BS;       ///< int64
  std::vector<std::int64_t> domain_B;
  std::int64_t num_targets = 0;
};

/// What     The given windows of `sequence_length` + 1 tokens as tensors.
MicroBatch make_micro_batch(const std::vector<data::Window>& windows, std::int64_t sequence_length,
                            std::int64_t first_sequence);

struct StepShape {
  std::int64_t sequence_length = 0;
  std::int64_t global_batch = 0;     ///< sequences of an optimizer step
  std::int64_t micro_sequences = 0;  ///< of a micro-step (the last may be shorter), over all ranks
  std::int64_t group_sequences = 1;  ///< whole groups of so many go to one rank

  std::int64_t num_micro_steps() const { return (global_batch + micro_sequences - 1) / micro_sequences; }
  /// Sequences of micro-step `index`, over all ranks.
  std::int64_t sequences_of(std::int64_t index) const {
    return std::min(micro_sequences, global_batch - index * micro_sequences);
  }
};

/// One rank's part of an optimizer step. Micro-steps are made when they are asked for: only one need be in
/// memory.
class StepBatches {
 public:
  /// Of step `step` (1, 2, …); `sampler` must outlive this.
  StepBatches(const data::Sampler& sampler, std::int64_t step, const StepShape& shape, int num_ranks,
              int rank)
      : sampler_(sampler), step_(step), shape_(shape), num_ranks_(num_ranks), rank_(rank) {}

  std::int64_t num_micro_steps() const { return shape_.num_micro_steps(); }
  /// What     Micro-step `index` (0, 1, …).
  /// Order    A function of (sampler, step): which sequences it holds does not depend on the number of ranks.
  MicroBatch micro_step(std::int64_t index) const;
  /// Targets of all of this rank's micro-steps.
  std::int64_t count_targets() const;

 private:
  struct Part;
  Part part(std::int64_t index) const;

  const data::Sampler& sampler_;
  std::int64_t step_;
  StepShape shape_;
  int num_ranks_;
  int rank_;
};

}  // namespace collegium::train
