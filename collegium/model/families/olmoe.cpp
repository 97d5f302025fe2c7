// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/model/families/family.h"

namespace collegium::model {

ModelConfig parse_olmoe(const HfReader& reader) {
  ModelConfig defaults;
  defaults.family = Family::kOlmoe;
  defaults.vocab_size = 50304;
  defaults.hidden_size = 2048;
  defaults.num_layers = 16;
  defaults.num_heads = 16;
  defaults.router_aux_loss_coef = 0.01;
  defaults.moe.num_experts = 64;
  defaults.moe.top_k = 8;
  ModelConfig c = parse_common(reader, defaults);
  require_config(c.head_dim == 0 || c.head_dim * c.num_heads == c.hidden_size,
                 "{}: head_dim = {}: must be hidden_size / num_attention_heads = {} / {}", reader.origin(),
                 c.head_dim, c.hidden_size, c.num_heads);
  if (!reader.json().contains("pad_token_id")) c.padding_id = 1;  // null means none
  c.moe.ffn_size = reader.get<std::int64_t>("intermediate_size", 2048);
  c.clip_qkv = reader.get("clip_qkv", 0.0);
  require_config(!reader.has("clip_qkv") || c.clip_qkv > 0.0,
                 "{}: clip_qkv = {}: must be positive, or null for none", reader.origin(), c.clip_qkv);
  c.qk_norm = QkNorm::kProjection;
  c.moe.router.renormalize =
      reader.get("norm_topk_prob", false) ? moe::Renormalize::kBeforeDrop : moe::Renormalize::kNever;
  return c;
}

std::optional<std::string> not_olmoe(const ModelConfig& c) {
  if (auto reason = not_plain_router(c)) return reason;
  if (c.qk_norm != QkNorm::kProjection) return "queries and keys are not normalised over the projection";
  if (c.head_dim * c.num_heads != c.hidden_size) return "head_dim x num_heads is not hidden_size";
  if (c.sliding_window != 0) return "there is a sliding window";
  if (std::find(c.moe_layers.begin(), c.moe_layers.end(), false) != c.moe_layers.end())
    return "there are dense layers";
  return std::nullopt;
}

void write_olmoe(const ModelConfig& c, Json& json) {
  json["model_type"] = "olmoe";
  json["architectures"] = {"OlmoeForCausalLM"};
  write_common(c, json);
  json["intermediate_size"] = c.moe.ffn_size;
  json["num_experts"] = c.moe.num_experts;
  json["clip_qkv"] = c.clip_qkv > 0.0 ? Json(c.clip_qkv) : Json();
  json["norm_topk_prob"] = c.moe.router.renormalize != moe::Renormalize::kNever;
}

}  // namespace collegium::model
