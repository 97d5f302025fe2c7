// SPDX-License-Identifier: Apache-2.0
#pragma once

// Loss and routing on held-out documents. Routing is dropless and without noise unless the model says
// otherwise.

#include <cstdint>
#include <vector>

#include "collegium/data/dataset.h"
#include "collegium/model/decoder.h"
#include "collegium/moe/monitors.h"
#include "collegium/parallel/groups.h"
#include "collegium/train/specialization.h"

namespace collegium::train {

struct ValidationResult {
  double loss = 0.0;  ///< nats per target token
  std::int64_t num_targets = 0;
  double hf_pooled = 0.0;                    ///< Hugging Face's pooled balance loss over all tokens
  std::vector<double> domain_loss;           ///< per domain; NaN (JSON: null) for one without a window
  std::vector<moe::LayerMonitors> monitors;  ///< per MoE layer
  std::vector<LayerSpecialization> specialization;
};

struct ValidationShape {
  std::int64_t sequence_length = 512;
  std::int64_t max_sequences = 64;
  bool mask_documents = false;
};

/// What     Refuses, before anything is trained, what validate_model() would refuse.
/// Throws   ConfigError: the validation split has no window of sequence_length tokens, or fewer than one
///          group of model.moe.capacity.group_sequences, or the windows taken have no target token.
void require_validation(const data::Dataset& dataset, const ValidationShape& shape,
                        const moe::MoeOptions& options);

/// What     Mean cross-entropy over at most `max_sequences` windows spread evenly over the validation split.
/// Comm     collective: the windows are shared over dp; the result is the same on all ranks.
/// Order    Always the same windows, whatever the number of ranks.
ValidationResult validate_model(const model::Decoder& decoder, const data::Dataset& dataset,
                                const ValidationShape& shape, const parallel::Groups& groups);

/// Throws ConfigError when the data's token ids do not fit the model's vocabulary, with both numbers.
void check_vocabulary(const data::Dataset& dataset, const model::ModelConfig& config);

}  // namespace collegium::train
