// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the planner knows about a model: sizes, and which parts have weights. Read from a Hugging Face
// config.json or built from a row of published runs. Letters of docs/notation.md: D hidden, F expert width, E
// experts, K top-k, V vocabulary, H heads, J key/value heads, A head dimension.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "collegium/base/fields.h"

namespace collegium::plan {

/// kNone; kPerHead: one vector of head_dim for queries and one for keys; kProjection: over whole projections.
enum class SpecQkNorm { kNone, kPerHead, kProjection };
/// kRms: D weights; kLayer: D weights and D biases.
enum class SpecNorm { kRms, kLayer };

/// Multi-head latent attention (DeepSeek-V2/V3); kv_rank = 0 means plain multi-head or grouped-query
/// attention.
struct LatentAttention {
  std::int64_t q_rank = 0;  ///< rank of the query's down-projection; 0 = none
  std::int64_t kv_rank = 0;
  std::int64_t nope_dim = 0;  ///< dimensions of a query or key head without rotary embedding
  std::int64_t rope_dim = 0;
  std::int64_t value_dim = 0;
};

struct ModelSpec {
  std::string name;
  std::string family;
  std::int64_t vocab = 0;     ///< V
  std::int64_t hidden = 0;    ///< D
  std::int64_t layers = 0;    ///< decoder layers without the multi-token-prediction ones
  std::int64_t heads = 0;     ///< H
  std::int64_t kv_heads = 0;  ///< J
  std::int64_t head_dim = 0;  ///< A
  LatentAttention latent;
  std::int64_t dense_ffn = 0;  ///< width of the feed-forward network of layers without experts
  bool gated_ffn = true;       ///< three matrices (SwiGLU, GeGLU) or two (GELU, ReLU)
  std::int64_t max_positions = 0;
  std::int64_t learned_positions = 0;  ///< rows of a learned position embedding; 0 = rotary, ALiBi or none
  SpecNorm norm = SpecNorm::kRms;
  SpecQkNorm qk_norm = SpecQkNorm::kNone;
  bool qkv_bias = false;
  bool attention_output_bias = false;
  bool ffn_bias = false;
  bool embedding_norm = false;   ///< a norm right after the embedding (BLOOM)
  bool attention_sinks = false;  ///< one weight per head (gpt-oss)
  bool tied_embeddings = false;

  std::int64_t experts = 0;   ///< E; 0 = a dense model
  std::int64_t top_k = 0;     ///< K
  double mean_experts = 0.0;  ///< of a token, where experts choose their tokens; 0 = K of every token
  std::int64_t expert_ffn = 0;
  std::int64_t shared_ffn = 0;    ///< width of the shared expert (all of them as one network)
  std::int64_t shared_gates = 0;  ///< rows that weigh the shared expert: one gates it (Qwen2-MoE), two mix it
                                  ///< with the routed ones
  bool router_bias = false;
  bool router_noise = false;  ///< a second matrix of the router's size, which learns its noise
  bool expert_bias = false;
  bool selection_bias = false;  ///< a buffer of E numbers per layer that is no parameter (DeepSeek-V3)
  std::int64_t routing_groups =
      0;  ///< experts are chosen from at most `routing_top_groups` of these; 0 = any
  std::int64_t routing_top_groups = 0;
  std::vector<bool> moe_layers;  ///< per decoder layer: experts (true) or dense
  std::int64_t mtp_layers = 0;   ///< multi-token-prediction layers, each a full layer more

  std::int64_t window = 0;  ///< keys that a query of a windowed layer sees; 0 = all layers see all keys
  std::vector<bool> window_layers;      ///< which layers use the window
  double attention_dropout_mask = 0.0;  ///< bytes kept per score of unfused attention for its dropout mask

  bool is_moe() const { return experts > 0; }
  /// Experts that compute a token, on average.
  double experts_per_token() const { return mean_experts > 0.0 ? mean_experts : static_cast<double>(top_k); }
  std::int64_t num_moe_layers() const;
  std::int64_t q_head_dim() const;      ///< dimension of a query's dot product with a key
  std::int64_t value_head_dim() const;  ///< dimension of a head's value
};

/// Weights of one layer, split by how tensor and expert parallelism treat them.
struct LayerWeights {
  std::int64_t attention_sharded = 0;  ///< divided over tensor-parallel ranks
  std::int64_t attention_replicated =
      0;                           ///< biases added after the reduction, latent down-projections, q/k norms
  std::int64_t norms = 0;          ///< replicated
  std::int64_t dense_sharded = 0;  ///< dense or shared feed-forward network
  std::int64_t dense_replicated = 0;
  std::int64_t router = 0;   ///< replicated
  std::int64_t expert = 0;   ///< one expert, all its matrices and biases
  std::int64_t experts = 0;  ///< experts of the layer over all ranks
  std::int64_t total() const;
  std::int64_t attention() const { return attention_sharded + attention_replicated; }
  std::int64_t dense() const { return dense_sharded + dense_replicated; }
};

/// What     Weights of decoder layer `layer` (from 0).
LayerWeights layer_weights(const ModelSpec& model, std::int64_t layer);
/// What     Weights of one multi-token-prediction layer: a full layer, two norms and the 2D x D projection
///          that joins the next token's embedding with the hidden state, and its final norm. Embedding and
///          head are shared.
std::int64_t mtp_layer_weights(const ModelSpec& model);
/// What     Weights of one norm: D (RMS) or 2 D (layer norm).
std::int64_t norm_weights(const ModelSpec& model);

/// What     Checks and completes a description (head_dim, kv_heads, moe_layers).
/// Throws   ConfigError naming field, value, rule and the other number.
void complete(ModelSpec& model, const std::string& origin);

/// What     A model by its name in the catalogue, or from a config.json (or a folder that holds one).
/// Throws   ConfigError: unknown name (with the nearest), unknown model_type, wrong or missing key.
ModelSpec load_model(const std::string& name_or_path);
/// The same from JSON at hand; `origin` names it in messages.
ModelSpec parse_model(const Json& config, const std::string& origin);
/// What     Names of the catalogue, sorted.
std::vector<std::string> model_names();

}  // namespace collegium::plan
