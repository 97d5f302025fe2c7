// SPDX-License-Identifier: Apache-2.0
#include "collegium/base/error.h"
#include "collegium/model/families/family.h"

namespace collegium::model {

namespace {

// Version 5 of transformers nests rope_theta in rope_parameters; the hub has it at the top, with rope_scaling
// beside it. As there, the nested one counts where both are given, and of two objects rope_scaling alone.
double read_rope_theta(const HfReader& reader, double fallback) {
  const double theta = reader.get("rope_theta", fallback);
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (!reader.has(key)) continue;
    const Json& json = reader.json()[key];
    require_config(json.is_object(), "{}: {} = {}: must be an object, or null", reader.origin(), key,
                   json.dump());
    if (json.empty()) continue;
    const HfReader rope(json, reader.origin() + ": " + key);
    const auto type = rope.get<std::string>({"rope_type", "type"}, "default");
    require_config(type == "default", "{}: rope_type = \"{}\": only \"default\" can be represented",
                   rope.origin(), type);
    return rope.get("rope_theta", theta);
  }
  return theta;
}

// One per query head where it is null; the class default where the key is absent.
std::int64_t read_num_kv_heads(const HfReader& reader, std::int64_t fallback) {
  const bool null = reader.json().contains("num_key_value_heads") && !reader.has("num_key_value_heads");
  return null ? 0 : reader.get("num_key_value_heads", fallback);
}

void refuse_unsupported(const HfReader& reader) {
  const auto act = reader.get<std::string>("hidden_act", "silu");
  require_config(act == "silu" || act == "swish", "{}: hidden_act = \"{}\": only \"silu\" can be represented",
                 reader.origin(), act);
  require_config(!reader.get("attention_bias", false),
                 "{}: attention_bias = true: only false can be represented", reader.origin());
  require_config(!reader.has("quantization_config"),
                 "{}: quantization_config: only weights that are not quantized can be represented",
                 reader.origin());
  const double dropout = reader.get("attention_dropout", 0.0);
  require_config(dropout == 0.0, "{}: attention_dropout = {}: only 0 can be represented", reader.origin(),
                 dropout);
}

// Which of two names counts differs between transformers' classes.
std::int64_t read_num_experts(const HfReader& reader, std::int64_t fallback) {
  const std::int64_t local = reader.get("num_local_experts", fallback);
  const std::int64_t count = reader.get("num_experts", local);
  require_config(!reader.has("num_local_experts") || count == local,
                 "{}: num_experts = {}: differs from num_local_experts = {}", reader.origin(), count, local);
  return count;
}

}  // namespace

ModelConfig parse_common(const HfReader& reader, const ModelConfig& defaults) {
  refuse_unsupported(reader);
  ModelConfig c = defaults;
  c.source = reader.json();
  c.vocab_size = reader.get("vocab_size", c.vocab_size);
  c.hidden_size = reader.get("hidden_size", c.hidden_size);
  c.num_layers = reader.get("num_hidden_layers", c.num_layers);
  require_listable(c);
  c.num_heads = reader.get("num_attention_heads", c.num_heads);
  c.num_kv_heads = read_num_kv_heads(reader, c.num_kv_heads);
  c.head_dim = reader.get("head_dim", c.head_dim);
  c.max_positions = reader.get("max_position_embeddings", c.max_positions);
  c.rope_theta = read_rope_theta(reader, c.rope_theta);
  c.norm_eps = reader.get("rms_norm_eps", c.norm_eps);
  c.initializer_range = reader.get("initializer_range", c.initializer_range);
  c.tie_embeddings = reader.get("tie_word_embeddings", c.tie_embeddings);
  c.padding_id = reader.get("pad_token_id", c.padding_id);
  c.moe.num_experts = read_num_experts(reader, c.moe.num_experts);
  c.moe.top_k = reader.get("num_experts_per_tok", c.moe.top_k);
  c.output_router_logits = reader.get("output_router_logits", c.output_router_logits);
  c.router_aux_loss_coef = reader.get("router_aux_loss_coef", c.router_aux_loss_coef);
  return c;
}

void write_common(const ModelConfig& c, Json& json) {
  json["hidden_act"] = "silu";
  json["vocab_size"] = c.vocab_size;
  json["hidden_size"] = c.hidden_size;
  json["num_hidden_layers"] = c.num_layers;
  json["num_attention_heads"] = c.num_heads;
  json["num_key_value_heads"] = c.num_kv_heads;
  json["max_position_embeddings"] = c.max_positions;
  json["rms_norm_eps"] = c.norm_eps;
  json["initializer_range"] = c.initializer_range;
  json["tie_word_embeddings"] = c.tie_embeddings;
  // Null, not absent: a class default (1 in OLMoE) would stand in for an absent key.
  json["pad_token_id"] = c.padding_id >= 0 ? Json(c.padding_id) : Json();
  json["num_experts_per_tok"] = c.moe.top_k;
  json["output_router_logits"] = c.output_router_logits;
  json["router_aux_loss_coef"] = c.router_aux_loss_coef;
  // Both dialects read one of the two.
  json["rope_theta"] = c.rope_theta;
  json["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", c.rope_theta}};
}

std::optional<std::string> not_plain_router(const ModelConfig& config) {
  const moe::RouterOptions& r = config.moe.router;
  const moe::CapacityOptions& capacity = config.moe.capacity;
  const bool drops = capacity.drop_policy != moe::DropPolicy::kNone && capacity.drop_in_evaluation;
  if (r.score != moe::ScoreFunction::kSoftmax) return "router.score is not softmax";
  if (r.order == moe::ScoreOrder::kSelectFirst) return "router.order is select_first";
  if (r.renormalize == moe::Renormalize::kAfterDrop && drops)
    return "weights are renormalised after dropping in evaluation";
  if (r.scaling_factor != 1.0) return "router.scaling_factor is not 1";
  if (r.num_groups != r.top_groups) return "routing is limited to groups";
  if (r.bias_balancing) return "experts have a bias";
  if (r.noise == moe::Noise::kNoisyTopK) return "the router has a noise matrix";
  if (r.selection != moe::Selection::kTopK && r.selection != moe::Selection::kSinkhorn)
    return "selection is not top-K";
  if (config.moe.shared_expert.kind != moe::SharedExpert::kNone) return "there is a shared expert";
  if (drops) return "tokens are dropped in evaluation";
  return std::nullopt;
}

}  // namespace collegium::model
