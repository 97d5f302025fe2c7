// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include "collegium/model/config.h"
#include "collegium/model/rotary.h"

namespace collegium::model {

/// Keys and values of the positions that are held, of one layer.
struct LayerCache {
  at::Tensor keys_BJCA;
  at::Tensor values_BJCA;
};

struct AttentionWeights {
  at::Tensor q;  ///< [H A, D]
  at::Tensor k;  ///< [J A, D]
  at::Tensor v;  ///< [J A, D]
  at::Tensor o;  ///< [D, H A]
  at::Tensor q_norm;
  at::Tensor k_norm;
};

/// What the layers of one forward pass share.
struct AttentionContext {
  RotaryTables rotary;
  at::Tensor mask;     ///< bool, broadcastable to [B, H, S, C], true = visible; undefined = plain causal
  bool causal = true;  ///< without a mask: false when one query sees every key
};

/// What     Which keys each query sees: earlier positions, within the sliding window, of the same document.
/// Shape    S queries at positions [past, past + S), keys at [0, past + S). document_ids_BS only with past
///          = 0.
/// Dtype    and device of the model's values: `options`.
AttentionContext attention_context(const ModelConfig& config, std::int64_t past, std::int64_t num_queries,
                                   const at::Tensor& document_ids_BS, const at::TensorOptions& options);

/// What     Causal self-attention with grouped key/value heads, rotary embedding and optional normalisation
///          of q and k.
/// Shape    x_BSD -> [B, S, D]; `cache` (optional) is extended by the new keys and values.
at::Tensor attention(const ModelConfig& config, const AttentionWeights& weights, const at::Tensor& x_BSD,
                     const AttentionContext& context, LayerCache* cache);

}  // namespace collegium::model
