// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "collegium/model/families/family.h"

namespace collegium::model {

ModelConfig parse_mixtral(const HfReader& reader) {
  ModelConfig defaults;
  defaults.family = Family::kMixtral;
  defaults.vocab_size = 32000;
  defaults.hidden_size = 4096;
  defaults.num_layers = 32;
  defaults.num_heads = 32;
  defaults.num_kv_heads = 8;
  defaults.max_positions = 131072;
  defaults.rope_theta = 1e6;
  defaults.moe.num_experts = 8;
  defaults.moe.top_k = 2;
  ModelConfig c = parse_common(reader, defaults);
  c.moe.ffn_size = reader.get<std::int64_t>("intermediate_size", 14336);
  c.sliding_window = reader.get<std::int64_t>("sliding_window", 0);
  c.moe.router.renormalize = moe::Renormalize::kBeforeDrop;
  const double jitter = reader.get("router_jitter_noise", 0.0);
  if (jitter > 0.0) {
    c.moe.router.noise = moe::Noise::kJitterInput;
    c.moe.router.jitter_epsilon = jitter;
  }
  return c;
}

std::optional<std::string> not_mixtral(const ModelConfig& c) {
  if (auto reason = not_plain_router(c)) return reason;
  if (c.moe.router.renormalize == moe::Renormalize::kNever) return "the weights are not renormalised";
  if (c.qk_norm != QkNorm::kNone) return "queries and keys are normalised";
  if (c.clip_qkv != 0.0) return "clip_qkv is set";
  if (std::find(c.moe_layers.begin(), c.moe_layers.end(), false) != c.moe_layers.end())
    return "there are dense layers";
  return std::nullopt;
}

void write_mixtral(const ModelConfig& c, Json& json) {
  json["model_type"] = "mixtral";
  json["architectures"] = {"MixtralForCausalLM"};
  write_common(c, json);
  json["head_dim"] = c.head_dim;
  json["intermediate_size"] = c.moe.ffn_size;
  json["num_local_experts"] = c.moe.num_experts;
  json["sliding_window"] = c.sliding_window > 0 ? Json(c.sliding_window) : Json();
  const bool jitter = c.moe.router.noise == moe::Noise::kJitterInput;
  json["router_jitter_noise"] = jitter ? c.moe.router.jitter_epsilon : 0.0;
}

}  // namespace collegium::model
