// SPDX-License-Identifier: Apache-2.0
#pragma once

// The parameter and FLOP account of a model.

#include <cstdint>

#include "collegium/model/config.h"

namespace collegium::model {

struct ParameterAccount {
  std::int64_t total = 0;
  std::int64_t active = 0;   ///< used by one token (on average), with embedding and output matrix
  std::int64_t experts = 0;  ///< in routed experts, all of them
  std::int64_t router = 0;
  std::int64_t embedding = 0;
  std::int64_t dense = 0;  ///< everything else
  std::int64_t norms = 0;  ///< of these, the weights of norms
};
/// What     Counts from the list of parameters alone; nothing is allocated. Buffers do not count.
/// Throws   ConfigError as num_values().
ParameterAccount count_parameters(const ModelConfig& config);

/// What     FLOPs of one token in training: 3 x forward; forward = 2 x (weights of the matrix products it
///          touches) + 2 H (2 A) keys per layer for attention, (S + 1) / 2 keys without a sliding window. A
///          multiply-add counts two.
double training_flops_per_token(const ModelConfig& config, std::int64_t sequence_length);

}  // namespace collegium::model
