// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/error.h"
#include "collegium/model/families/family.h"

namespace collegium::model {

ModelConfig parse_qwen3_moe(const HfReader& reader) {
  ModelConfig defaults;
  defaults.family = Family::kQwen3Moe;
  defaults.vocab_size = 151936;
  defaults.hidden_size = 2048;
  defaults.num_layers = 24;
  defaults.num_heads = 32;
  defaults.num_kv_heads = 4;
  defaults.max_positions = 32768;
  defaults.norm_eps = 1e-6;
  defaults.moe.num_experts = 128;
  defaults.moe.top_k = 8;
  require_config(!reader.json().contains("num_key_value_heads") || reader.has("num_key_value_heads"),
                 "{}: num_key_value_heads = null: must be a whole number", reader.origin());
  ModelConfig c = parse_common(reader, defaults);
  c.moe.ffn_size = reader.get<std::int64_t>("moe_intermediate_size", 768);
  c.dense_ffn_size = reader.get<std::int64_t>("intermediate_size", 6144);
  c.qk_norm = QkNorm::kPerHead;
  // null means none, also where windows are switched on
  const bool windows = reader.get("use_sliding_window", false) &&
                       (reader.has("sliding_window") || !reader.json().contains("sliding_window"));
  c.sliding_window = windows ? reader.get<std::int64_t>("sliding_window", 4096) : std::int64_t{0};
  c.moe.router.renormalize =
      reader.get("norm_topk_prob", false) ? moe::Renormalize::kBeforeDrop : moe::Renormalize::kNever;
  const auto step = reader.get<std::int64_t>("decoder_sparse_step", 1);
  require_config(step >= 1, "{}: decoder_sparse_step = {}: must be at least 1", reader.origin(), step);
  require_config(c.num_layers >= 1, "{}: num_hidden_layers = {}: must be at least 1", reader.origin(),
                 c.num_layers);
  const auto dense = reader.get<std::vector<std::int64_t>>("mlp_only_layers", {});
  for (std::int64_t layer = 0; layer < c.num_layers; ++layer) c.moe_layers.push_back((layer + 1) % step == 0);
  for (const std::int64_t layer : dense) {
    if (layer >= 0 && layer < c.num_layers) c.moe_layers[static_cast<std::size_t>(layer)] = false;
  }
  return c;
}

std::optional<std::string> not_qwen3_moe(const ModelConfig& c) {
  if (auto reason = not_plain_router(c)) return reason;
  if (c.qk_norm != QkNorm::kPerHead) return "queries and keys are not normalised per head";
  if (c.clip_qkv != 0.0) return "clip_qkv is set";
  return std::nullopt;
}

void write_qwen3_moe(const ModelConfig& c, Json& json) {
  json["model_type"] = "qwen3_moe";
  json["architectures"] = {"Qwen3MoeForCausalLM"};
  write_common(c, json);
  json["head_dim"] = c.head_dim;
  json["moe_intermediate_size"] = c.moe.ffn_size;
  json["intermediate_size"] = c.dense_ffn_size;
  json["num_experts"] = c.moe.num_experts;
  json["norm_topk_prob"] = c.moe.router.renormalize != moe::Renormalize::kNever;
  json["attention_bias"] = false;
  json["use_sliding_window"] = c.sliding_window > 0;
  json["sliding_window"] = c.sliding_window > 0 ? Json(c.sliding_window) : Json();
  json["decoder_sparse_step"] = 1;
  json["mlp_only_layers"] = Json::array();
  for (std::size_t layer = 0; layer < c.moe_layers.size(); ++layer) {
    if (!c.moe_layers[layer]) json["mlp_only_layers"].push_back(layer);
  }
}

}  // namespace collegium::model
