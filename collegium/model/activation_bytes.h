// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "collegium/model/config.h"

namespace collegium::model {

/// Tokens whose logits exist at one time: 1024 x 8192 in bf16 are 16 MiB, about the size of a shared cache.
inline constexpr std::int64_t kLossChunkTokens = 1024;

/// What a rank's forward pass keeps for its backward pass, in bytes per token, experts and their rows taken
/// as balanced.
struct ActivationBytes {
  double layer = 0.0;  ///< mean over the layers
  double recomputed =
      0.0;                ///< the same when blocks are recomputed: a block's input, and what the router chose
  double outside = 0.0;   ///< of all layers: final norm, the loss's gradient, ids
  double backward = 0.0;  ///< largest extra that one layer's backward pass needs while it runs
};

/// What     Counts the tensors that the functions of this module and of `moe` save. Exact for the options
///          that change no shape; a capacity that drops rows makes it an upper bound.
ActivationBytes activation_bytes(const ModelConfig& config, c10::ScalarType dtype);

}  // namespace collegium::model
