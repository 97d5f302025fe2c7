// SPDX-License-Identifier: Apache-2.0
#pragma once

// The description of a decoder, independent of the file it came from. model/families/ converts Hugging Face's
// config.json of each family to and from it.

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/moe/options.h"

namespace collegium::model {

/// kCollegium: a model that no family can express; transformers refuses its model_type "collegium_moe".
enum class Family { kMixtral, kOlmoe, kQwen3Moe, kCollegium };
/// kNone; kPerHead: over the head dim after the split (Qwen3); kProjection: over the whole projection
/// (OLMoE).
enum class QkNorm { kNone, kPerHead, kProjection };

struct ModelConfig {
  Family family = Family::kMixtral;
  std::int64_t vocab_size = 0;   ///< V
  std::int64_t hidden_size = 0;  ///< D
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;       ///< H
  std::int64_t num_kv_heads = 0;    ///< J
  std::int64_t head_dim = 0;        ///< A
  std::int64_t dense_ffn_size = 0;  ///< F of layers without experts
  std::int64_t max_positions = 4096;
  double rope_theta = 10000.0;
  double norm_eps = 1e-5;
  double initializer_range = 0.02;
  double clip_qkv = 0.0;            ///< clamp of q, k, v to [-c, c]; 0 = none (OLMoE)
  std::int64_t sliding_window = 0;  ///< keys visible to a query; 0 = all
  QkNorm qk_norm = QkNorm::kNone;
  bool tie_embeddings = false;
  std::int64_t padding_id = -1;  ///< its embedding gets no gradient from the input (pad_token_id); -1 = none
  std::vector<bool> moe_layers;  ///< per layer: experts (true) or a dense block
  moe::MoeOptions moe;
  bool output_router_logits = false;  ///< transformers adds the pooled aux loss to the loss when set
  double router_aux_loss_coef = 0.001;

  Json source =
      Json::object();  ///< the config.json it was read from: keys we do not use survive a round trip
};

/// What     The keys of a model that is described inline in a run file, and of the "collegium_moe" family's
///          config.json.
template <class Fields>
void describe(Fields& fields, ModelConfig& c) {
  fields("family", c.family, "mixtral, olmoe, qwen3_moe (their checkpoint formats) or collegium_moe");
  fields("vocab_size", c.vocab_size, "tokens in the vocabulary (V); 0 in a run file = the data's");
  fields("hidden_size", c.hidden_size, "model dimension (D)");
  fields("num_layers", c.num_layers, "decoder blocks");
  fields("num_heads", c.num_heads, "query heads (H)");
  fields("num_kv_heads", c.num_kv_heads, "key/value heads (J); 0 = num_heads");
  fields("head_dim", c.head_dim, "dimension of a head (A); 0 = hidden_size / num_heads");
  fields("dense_ffn_size", c.dense_ffn_size, "feed-forward width of the layers without experts");
  fields("max_positions", c.max_positions, "longest sequence");
  fields("rope_theta", c.rope_theta, "base of the rotary embedding");
  fields("norm_eps", c.norm_eps, "epsilon of every RMSNorm");
  fields("initializer_range", c.initializer_range, "standard deviation of the initial weights");
  fields("clip_qkv", c.clip_qkv, "clamp queries, keys and values to [-c, c]; 0 = off");
  fields("sliding_window", c.sliding_window, "keys that a query sees; 0 = all");
  fields("qk_norm", c.qk_norm, "none, per_head (Qwen3) or projection (OLMoE)");
  fields("tie_embeddings", c.tie_embeddings, "use the embedding as output matrix too");
  fields("padding_id", c.padding_id,
         "token whose embedding is not trained through the input (pad_token_id); -1 = none");
  fields("moe_layers", c.moe_layers, "per layer true (experts) or false (dense); empty = experts everywhere");
  fields("moe", c.moe, "the experts");
}

/// What     Number of the decoder's layer that is its `moe_layer`-th with experts; -1 without so many.
std::int64_t layer_number(const ModelConfig& config, std::size_t moe_layer);

/// What     Fills what may be left out: num_kv_heads, head_dim, moe_layers.
void complete(ModelConfig& config);

/// What     Why no config.json of the model's family can describe it, so that its checkpoints are of
///          collegium_moe; nothing where one can, and for collegium_moe itself.
std::optional<std::string> not_of_family(const ModelConfig& config);

/// What     Reads `DIR/config.json` (or a path to a .json file) in the dialect of transformers 4 or 5.
/// Throws   ConfigError naming file, key, value and rule for anything that cannot be represented exactly.
ModelConfig read_model_config(const std::filesystem::path& path);
/// The same from JSON at hand; `origin` names it in messages.
ModelConfig parse_model_config(const Json& json, const std::string& origin);
/// What     The tokens that end a text: eos_token_id (a number or a list) of DIR/generation_config.json, else
///          of the config.json that `config` was read from; empty where neither has one.
/// Throws   ConfigError naming file, key and value.
std::vector<std::int64_t> read_eos_ids(const std::filesystem::path& directory, const ModelConfig& config);
/// What     The config.json of this model: its family's where the family can express it, else model_type
///          "collegium_moe". Options the family has no key for, and that do not change what the model
///          computes in evaluation (noise, balance losses, capacity in training), go under "collegium".
Json write_model_config(const ModelConfig& config, const std::string& dtype_name);
/// Throws ConfigError for contradictory sizes, before anything is allocated.
void validate(const ModelConfig& config, bool training);

}  // namespace collegium::model

namespace collegium {
template <>
struct EnumNames<model::Family> {
  static constexpr std::pair<std::string_view, model::Family> names[] = {
      {"mixtral", model::Family::kMixtral},
      {"olmoe", model::Family::kOlmoe},
      {"qwen3_moe", model::Family::kQwen3Moe},
      {"collegium_moe", model::Family::kCollegium}};
};
template <>
struct EnumNames<model::QkNorm> {
  static constexpr std::pair<std::string_view, model::QkNorm> names[] = {
      {"none", model::QkNorm::kNone},
      {"per_head", model::QkNorm::kPerHead},
      {"projection", model::QkNorm::kProjection}};
};
}  // namespace collegium
