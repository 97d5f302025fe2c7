// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "collegium/model/config.h"
#include "collegium/parallel/groups.h"

namespace collegium::parallel {

/// What     Compares what the ranks on this rank's node must hold with the node's memory, before anything is
///          allocated: weights, gradients and optimizer state, and of the activations of a micro-step of
///          `micro_tokens` tokens (of all ranks) the blocks' inputs, without which no backward pass is
///          possible.
/// Throws   ConfigError with all numbers.
void require_memory(const model::ModelConfig& config, const Groups& groups, std::int64_t bytes_per_value,
                    std::int64_t micro_tokens);

}  // namespace collegium::parallel
