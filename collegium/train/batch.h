// SPDX-License-Identifier: Apache-2.0
#pragma once

// From windows of the corpus to the tensors of a micro-step.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "collegium/data/dataset.h"

namespace collegium::train {

struct MicroBatch {
  std::int64_t first_sequence = 0;  ///< within the optimizer step's global batch
  at::Tensor ids_BS;                ///< int64
  at::Tensor targets_BS;            ///< int64, -100 = no target
  at::Tensor document_ids_BS;       ///< int64
  std::vector<std::int64_t> domain_B;
  std::int64_t num_targets = 0;
};

/// What     The micro-step of the given windows.
MicroBatch make_micro_batch(const std::vector<data::Window>& windows, std::int64_t first_sequence);

/// What     The micro-steps of optimizer step `step` (1, 2, …): global_batch consecutive samples, cut into
/// runs of
///          micro_sequences (the last may be shorter).
/// Order    A function of (sampler, step): which sequences a micro-step holds does not depend on the number
/// of ranks.
std::vector<MicroBatch> make_step(const data::Sampler& sampler, std::int64_t step, std::int64_t global_batch,
                                  std::int64_t micro_sequences);

}  // namespace collegium::train
