// SPDX-License-Identifier: Apache-2.0
#pragma once

// The decoder-only transformer: embedding, blocks (attention + experts or dense feed-forward), final norm,
// head.

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "collegium/model/attention.h"
#include "collegium/model/config.h"
#include "collegium/model/parameters.h"
#include "collegium/moe/layer.h"

namespace collegium::model {

/// Keys and values of past positions, per layer, for generation.
struct KvCache {
  std::vector<LayerCache> layers;
  std::int64_t length = 0;  ///< positions held
};

struct ForwardOptions {
  moe::TokenContext context;   ///< sizes and `layer` are filled in by the decoder
  bool recompute = false;      ///< keep only block inputs for the backward pass and recompute the rest
  at::Tensor document_ids_BS;  ///< int64: attention stays within equal ids; undefined = crosses documents
  KvCache* cache = nullptr;    ///< generation: append these tokens and attend to all that are held
  std::vector<at::Tensor> replayed_ids;  ///< per MoE layer int32 [T, K], or empty
  /// Sees what the pass computes, in order: ("embedding output"), ("attention output of layer 3"), ...
  std::function<void(const std::string& what, const at::Tensor& value)> observer;
};

struct ForwardResult {
  at::Tensor hidden_BSD;                               ///< after the final norm
  std::vector<std::shared_ptr<moe::LayerRun>> layers;  ///< one per MoE layer, in order
};

class Decoder {
 public:
  /// The parameters must be initialised or loaded. Trainable ones become autograd leaves.
  Decoder(ModelConfig config, std::vector<Parameter> parameters, moe::ExpertTransport transport);
  /// Of a rank that holds every expert.
  Decoder(const ModelConfig& config, std::vector<Parameter> parameters);

  const ModelConfig& config() const { return config_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  std::vector<Parameter>& parameters() { return parameters_; }
  /// Throws InternalError when there is none of this name.
  const at::Tensor& value(const std::string& name) const { return parameter(name).value; }
  const Parameter& parameter(const std::string& name) const;
  at::ScalarType dtype() const { return parameters_[0].value.scalar_type(); }
  std::int64_t num_moe_layers() const;

  /// What     Hidden states of ids_BS (int64 [B, S]).
  ForwardResult forward(const at::Tensor& ids_BS, const ForwardOptions& options) const;
  /// What     The matrix of the output logits, [V, D]: the embedding when it is tied.
  const at::Tensor& output_matrix() const;
  /// What     hidden W^T in the compute dtype, [..., V].
  at::Tensor logits(const at::Tensor& hidden) const;

 private:
  struct Block;
  struct BlockCall;
  at::Tensor run_block(const Block& block, const at::Tensor& x_BSD, const BlockCall& call) const;

  ModelConfig config_;
  std::vector<Parameter> parameters_;
  std::map<std::string, std::size_t> index_;
  std::vector<std::shared_ptr<Block>> blocks_;
  moe::ExpertTransport transport_;
};

/// What     Sum over targets of cross-entropy: -sum log softmax(hidden W^T)[target]. [T, V] never exists as
///          a whole.
/// Shape    hidden_BSD [B, S, D], targets_BS int64 with -100 = not a target. Returns a scalar with
///          autograd.
/// Dtype    logits in the compute dtype, softmax in fp32 (fp64 for fp64), summed over chunks in fp64.
at::Tensor cross_entropy_sum(const Decoder& decoder, const at::Tensor& hidden_BSD,
                             const at::Tensor& targets_BS);

}  // namespace collegium::model
