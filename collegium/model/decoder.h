// SPDX-License-Identifier: Apache-2.0
#pragma once

// The decoder-only transformer: embedding, blocks (attention + experts or dense feed-forward), final norm,
// head.

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "collegium/model/config.h"
#include "collegium/model/parameters.h"
#include "collegium/moe/layer.h"

namespace collegium::model {

/// Keys and values of past positions, per layer, for generation.
struct KvCache {
  struct Layer {
    at::Tensor keys_BJCA;
    at::Tensor values_BJCA;
  };
  std::vector<Layer> layers;
  std::int64_t length = 0;  ///< positions held
};

struct ForwardOptions {
  moe::TokenContext context;   ///< `layer` is filled in per layer
  bool recompute = false;      ///< keep only block inputs for the backward pass and recompute the rest
  at::Tensor document_ids_BS;  ///< int64: attention stays within equal ids; undefined = crosses documents
  KvCache* cache = nullptr;    ///< generation: append these tokens and attend to all that are held
  std::vector<at::Tensor> replayed_ids;  ///< per MoE layer int32 [T, K], or empty
};

struct ForwardResult {
  at::Tensor hidden_BSD;                               ///< after the final norm
  std::vector<std::shared_ptr<moe::LayerRun>> layers;  ///< one per MoE layer, in order
};

class Decoder {
 public:
  /// The parameters must be initialised or loaded; the decoder keeps a copy of the (shallow) list.
  Decoder(ModelConfig config, std::vector<Parameter> parameters);

  const ModelConfig& config() const { return config_; }
  std::vector<Parameter>& parameters() { return parameters_; }
  const Parameter& parameter(const std::string& name) const;

  /// What     Hidden states of ids_BS (int64 [B, S]).
  ForwardResult forward(const at::Tensor& ids_BS, const ForwardOptions& options);
  /// What     hidden W^T in the compute dtype, [..., V].
  at::Tensor logits(const at::Tensor& hidden) const;

 private:
  ModelConfig config_;
  std::vector<Parameter> parameters_;
  std::unique_ptr<moe::Dispatcher> dispatcher_;
};

/// What     Sum over targets of cross-entropy in fp32 (float64 for float64): -sum log
/// softmax(logits)[target]. Shape    hidden_BSD, targets_BS int64 with -100 = not a target. Returns a scalar
/// with autograd.
at::Tensor cross_entropy_sum(const Decoder& decoder, const at::Tensor& hidden_BSD,
                             const at::Tensor& targets_BS);

}  // namespace collegium::model
