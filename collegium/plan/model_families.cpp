// SPDX-License-Identifier: Apache-2.0
// config.json of each Hugging Face family as a ModelSpec. Only sizes are read: what changes no weight and no
// FLOP is ignored, so released files load as they are.
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <functional>
#include <map>

#include "collegium/base/error.h"
#include "collegium/plan/model_spec.h"

namespace collegium::plan {

namespace {

// Reads keys with the message the user needs: file, key, value, what was expected.
class Keys {
 public:
  Keys(Json json, std::string origin) : json_(std::move(json)), origin_(std::move(origin)) {}

  std::int64_t require(std::initializer_list<const char*> keys) const {
    const char* found = nullptr;
    for (const char* key : keys) {
      if (!present(key)) continue;
      if (found == nullptr) found = key;
      require_config(integer(found) == integer(key), "{}: {} = {}: differs from {} = {}", origin_, key,
                     integer(key), found, integer(found));
    }
    require_config(found != nullptr, "{}: {} is missing", origin_, *keys.begin());
    return integer(found);
  }
  std::int64_t get(const char* key, std::int64_t fallback) const {
    return present(key) ? integer(key) : fallback;
  }
  /// The number of layers, of which lists are made.
  std::int64_t layers(std::initializer_list<const char*> keys) const {
    constexpr std::int64_t kMost = 10000;
    const std::int64_t value = require(keys);
    require_config(value >= 1 && value <= kMost, "{}: layers = {}: must lie between 1 and {}", origin_, value,
                   kMost);
    return value;
  }
  /// A whole number of at least `least`.
  std::int64_t at_least(std::int64_t least, const char* key, std::int64_t fallback) const {
    const std::int64_t value = get(key, fallback);
    require_config(value >= least, "{}: {} = {}: must be at least {}", origin_, key, value, least);
    return value;
  }
  /// The elements of a list, none where it is not there.
  std::vector<Json> list(const char* key) const {
    if (!present(key)) return {};
    require_config(json_[key].is_array(), "{}: {} = {}: must be a list", origin_, key, json_[key].dump());
    return {json_[key].begin(), json_[key].end()};
  }
  /// One of some names.
  std::string name(const char* key, std::initializer_list<std::string_view> names) const {
    const std::string value = text(key, std::string(*names.begin()));
    require_config(std::find(names.begin(), names.end(), value) != names.end(),
                   "{}: {} = \"{}\": must be one of {}", origin_, key, value, fmt::join(names, ", "));
    return value;
  }
  bool flag(const char* key, bool fallback) const {
    if (!present(key)) return fallback;
    require_config(json_[key].is_boolean(), "{}: {} = {}: must be true or false", origin_, key,
                   json_[key].dump());
    return json_[key].get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) const {
    if (!present(key)) return fallback;
    require_config(json_[key].is_string(), "{}: {} = {}: must be a text", origin_, key, json_[key].dump());
    return json_[key].get<std::string>();
  }
  bool present(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }
  const Json& json() const { return json_; }
  const std::string& origin() const { return origin_; }
  /// The keys below `key`, none where it is not there.
  Keys part(const char* key) const {
    if (!present(key)) return {Json::object(), fmt::format("{}: {}", origin_, key)};
    require_config(json_[key].is_object(), "{}: {}: must be an object", origin_, key);
    return {json_[key], fmt::format("{}: {}", origin_, key)};
  }

 private:
  std::int64_t integer(const char* key) const {
    require_config(json_[key].is_number_integer(), "{}: {} = {}: must be a whole number", origin_, key,
                   json_[key].dump());
    // Products of two sizes fit 63 bits.
    constexpr std::int64_t kLimit = std::int64_t{1} << 31;
    const auto value = json_[key].get<std::int64_t>();
    const bool huge = json_[key].is_number_unsigned() && value < 0;
    require_config(!huge && value > -kLimit && value < kLimit, "{}: {} = {}: must be below 2^31", origin_,
                   key, json_[key].dump());
    return value;
  }

  Json json_;
  std::string origin_;
};

// Keys that llama-like families share.
ModelSpec llama_like(const Keys& keys) {
  ModelSpec m;
  m.vocab = keys.require({"vocab_size"});
  m.hidden = keys.require({"hidden_size"});
  m.layers = keys.layers({"num_hidden_layers", "num_layers"});
  m.heads = keys.require({"num_attention_heads"});
  m.kv_heads = keys.get("num_key_value_heads", m.heads);
  m.head_dim = keys.get("head_dim", 0);
  m.dense_ffn = keys.get("intermediate_size", 0);
  m.max_positions = keys.get("max_position_embeddings", 0);
  m.tied_embeddings = keys.flag("tie_word_embeddings", false);
  m.qkv_bias = keys.flag("attention_bias", false);
  m.attention_output_bias = m.qkv_bias;
  return m;
}

ModelSpec mixtral(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.experts = keys.require({"num_local_experts", "num_experts"});
  m.top_k = keys.get("num_experts_per_tok", 2);
  m.expert_ffn = keys.require({"intermediate_size"});
  return m;
}

// Which layers have experts, by the keys of the Qwen families.
void qwen_moe_layers(const Keys& keys, ModelSpec& m) {
  const std::int64_t step = keys.at_least(1, "decoder_sparse_step", 1);
  for (std::int64_t layer = 0; layer < m.layers; ++layer) m.moe_layers.push_back((layer + 1) % step == 0);
  for (const Json& layer : keys.list("mlp_only_layers")) {
    require_config(layer.is_number_integer() && layer >= 0 && layer < m.layers,
                   "{}: mlp_only_layers has {}: must be layers from 0 to num_hidden_layers - 1 = {}",
                   keys.origin(), layer.dump(), m.layers - 1);
    m.moe_layers.at(layer.get<std::size_t>()) = false;
  }
}

ModelSpec qwen3_moe(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.experts = keys.require({"num_experts", "num_local_experts"});
  m.top_k = keys.get("num_experts_per_tok", 8);
  m.expert_ffn = keys.require({"moe_intermediate_size"});
  m.qk_norm = SpecQkNorm::kPerHead;
  qwen_moe_layers(keys, m);
  return m;
}

ModelSpec qwen2_moe(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.qkv_bias = true;
  m.experts = keys.require({"num_experts"});
  m.top_k = keys.get("num_experts_per_tok", 4);
  m.expert_ffn = keys.require({"moe_intermediate_size"});
  m.shared_ffn = keys.get("shared_expert_intermediate_size", 0);
  m.shared_gates = m.shared_ffn > 0 ? 1 : 0;
  qwen_moe_layers(keys, m);
  return m;
}

ModelSpec olmoe(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.experts = keys.require({"num_experts"});
  m.top_k = keys.get("num_experts_per_tok", 8);
  m.expert_ffn = keys.require({"intermediate_size"});
  m.qk_norm = SpecQkNorm::kProjection;
  return m;
}

// One group of all experts limits nothing, nor do all groups.
void limit_routing(std::int64_t groups, std::int64_t top_groups, ModelSpec& m) {
  if (groups == 1 || top_groups == groups) return;
  m.routing_groups = groups;
  m.routing_top_groups = top_groups;
}

ModelSpec deepseek(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.latent = {.q_rank = keys.get("q_lora_rank", 0),
              .kv_rank = keys.require({"kv_lora_rank"}),
              .nope_dim = keys.require({"qk_nope_head_dim"}),
              .rope_dim = keys.require({"qk_rope_head_dim"}),
              .value_dim = keys.require({"v_head_dim"})};
  m.head_dim = m.latent.nope_dim + m.latent.rope_dim;
  m.experts = keys.require({"n_routed_experts"});
  m.top_k = keys.require({"num_experts_per_tok"});
  m.expert_ffn = keys.require({"moe_intermediate_size"});
  m.shared_ffn = keys.at_least(0, "n_shared_experts", 0) * m.expert_ffn;
  const std::int64_t dense = keys.get("first_k_dense_replace", 0);
  const std::int64_t step = keys.at_least(1, "moe_layer_freq", 1);
  for (std::int64_t layer = 0; layer < m.layers; ++layer)
    m.moe_layers.push_back(layer >= dense && layer % step == 0);
  m.selection_bias =
      keys.text("topk_method", "") == "noaux_tc" || keys.text("model_type", "") != "deepseek_v2";
  m.mtp_layers = keys.at_least(0, "num_nextn_predict_layers", 0);
  const std::int64_t groups = keys.at_least(1, "n_group", 1);
  limit_routing(groups, keys.at_least(1, "topk_group", groups), m);
  return m;
}

ModelSpec gpt_oss(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.qkv_bias = keys.flag("attention_bias", true);
  m.attention_output_bias = m.qkv_bias;
  m.attention_sinks = true;
  m.experts = keys.require({"num_local_experts", "num_experts"});
  m.top_k = keys.require({"num_experts_per_tok", "experts_per_token"});
  m.expert_ffn = keys.require({"intermediate_size"});
  m.router_bias = true;
  m.expert_bias = true;
  m.window = keys.get("sliding_window", 0);
  for (std::int64_t layer = 0; layer < m.layers; ++layer)
    m.window_layers.push_back(m.window > 0 && layer % 2 == 0);
  return m;
}

// GPT-2-like: layer norms with bias, biases everywhere, two matrices, tied output.
ModelSpec gpt_like(ModelSpec m, const Keys& keys) {
  m.norm = SpecNorm::kLayer;
  m.gated_ffn = false;
  m.qkv_bias = m.attention_output_bias = m.ffn_bias = true;
  m.tied_embeddings = keys.flag("tie_word_embeddings", true);
  return m;
}

ModelSpec gpt2(const Keys& keys) {
  ModelSpec m;
  m.vocab = keys.require({"vocab_size"});
  m.hidden = keys.require({"n_embd", "hidden_size"});
  m.layers = keys.layers({"n_layer", "num_hidden_layers"});
  m.heads = keys.require({"n_head", "num_attention_heads"});
  m.dense_ffn = keys.get("n_inner", 4 * m.hidden);
  m.max_positions = keys.get("n_positions", 1024);
  m.learned_positions = m.max_positions;
  return gpt_like(m, keys);
}

ModelSpec bloom(const Keys& keys) {
  ModelSpec m;
  m.vocab = keys.require({"vocab_size"});
  m.hidden = keys.require({"hidden_size", "n_embed"});
  m.layers = keys.layers({"n_layer", "num_hidden_layers"});
  m.heads = keys.require({"n_head", "num_attention_heads"});
  m.dense_ffn = 4 * m.hidden;
  m.max_positions = keys.get("seq_length", 2048);
  m.embedding_norm = true;
  return gpt_like(m, keys);
}

ModelSpec opt(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.dense_ffn = keys.get("ffn_dim", 4 * m.hidden);
  m.max_positions = keys.get("max_position_embeddings", 2048);
  // The family's position table starts two rows later than its first position.
  m.learned_positions = m.max_positions + 2;
  return gpt_like(m, keys);
}

// What a family's keys cannot say: GLM-130B has layer norms and biases where later GLM models have neither.
ModelSpec glm(const Keys& keys) {
  ModelSpec m = llama_like(keys);
  m.attention_output_bias = false;
  if (!keys.present("collegium")) return m;
  const Keys extra(keys.json()["collegium"], "collegium");
  if (extra.text("norm", "rms") == "layer") m.norm = SpecNorm::kLayer;
  m.attention_output_bias = m.ffn_bias = extra.flag("biases", false);
  m.qkv_bias = m.qkv_bias || m.ffn_bias;
  return m;
}

// Where experts choose their tokens, how many compute a token on average; 0 where tokens choose.
double mean_experts(const Keys& router, std::int64_t experts) {
  if (router.text("selection", "top_k") != "expert_choice") return 0.0;
  const std::string factor = router.text("expert_choice_factor", "2");
  double number = 0.0;
  const auto [end, error] = std::from_chars(factor.data(), factor.data() + factor.size(), number);
  require_config(error == std::errc() && end == factor.data() + factor.size() && number > 0.0,
                 "expert_choice_factor = \"{}\": must be a positive number", factor);
  return std::min(number, static_cast<double>(experts));
}

// What a router has beside its matrix, and whom it may choose.
void read_router(const Keys& router, ModelSpec& m) {
  m.router_noise = router.text("noise", "none") == "noisy_top_k";
  m.selection_bias = router.flag("bias_balancing", false);
  limit_routing(router.at_least(1, "num_groups", 1), router.at_least(1, "top_groups", 1), m);
}

// Everything stands under "collegium", by the names of a run file's [model].
ModelSpec collegium_moe(const Keys& file) {
  const Keys keys = file.part("collegium");
  const Keys moe = keys.part("moe");
  ModelSpec m;
  m.vocab = keys.require({"vocab_size"});
  m.hidden = keys.require({"hidden_size"});
  m.layers = keys.layers({"num_layers"});
  m.heads = keys.require({"num_heads"});
  m.kv_heads = keys.get("num_kv_heads", 0);
  m.head_dim = keys.get("head_dim", 0);
  m.dense_ffn = keys.get("dense_ffn_size", 0);
  m.max_positions = keys.get("max_positions", 0);
  m.tied_embeddings = keys.flag("tie_embeddings", false);
  m.experts = moe.require({"num_experts"});
  m.mean_experts = mean_experts(moe.part("router"), m.experts);
  m.top_k = m.mean_experts > 0.0 ? m.experts : moe.require({"top_k"});
  m.expert_ffn = moe.require({"ffn_size"});
  read_router(moe.part("router"), m);
  const Keys shared = moe.part("shared_expert");
  const std::string kind = shared.name("kind", {"none", "sum", "gated", "residual_mix"});
  // A width may stand there although no such expert does.
  if (kind != "none") m.shared_ffn = shared.at_least(1, "ffn_size", 0);
  if (kind != "none") m.shared_gates = kind == "gated" ? 1 : (kind == "residual_mix" ? 2 : 0);
  m.window = keys.at_least(0, "sliding_window", 0);
  if (m.window > 0) m.window_layers.assign(static_cast<std::size_t>(m.layers), true);
  const std::string norm = keys.name("qk_norm", {"none", "per_head", "projection"});
  m.qk_norm = norm == "per_head" ? SpecQkNorm::kPerHead
                                 : (norm == "projection" ? SpecQkNorm::kProjection : SpecQkNorm::kNone);
  for (const Json& layer : keys.list("moe_layers")) {
    require_config(layer.is_boolean(), "{}: moe_layers has {}: must be true (experts) or false (dense)",
                   keys.origin(), layer.dump());
    m.moe_layers.push_back(layer.get<bool>());
  }
  return m;
}

using Parser = std::function<ModelSpec(const Keys&)>;

const std::map<std::string, Parser>& parsers() {
  static const std::map<std::string, Parser> table = {{"mixtral", mixtral},
                                                      {"qwen3_moe", qwen3_moe},
                                                      {"qwen2_moe", qwen2_moe},
                                                      {"olmoe", olmoe},
                                                      {"deepseek_v2", deepseek},
                                                      {"deepseek_v3", deepseek},
                                                      {"kimi_k2", deepseek},
                                                      {"gpt_oss", gpt_oss},
                                                      {"llama", llama_like},
                                                      {"gpt2", gpt2},
                                                      {"bloom", bloom},
                                                      {"opt", opt},
                                                      {"glm", glm},
                                                      {"collegium_moe", collegium_moe}};
  return table;
}

}  // namespace

ModelSpec parse_model(const Json& config, const std::string& origin) {
  require_config(config.is_object(), "{}: must be a JSON object", origin);
  const Keys keys(config, origin);
  const std::string family = keys.text("model_type", "");
  const auto parser = parsers().find(family);
  if (parser == parsers().end()) {
    std::string known;
    for (const auto& [name, unused] : parsers()) known += (known.empty() ? "" : ", ") + name;
    throw ConfigError(fmt::format("{}: model_type = \"{}\": must be one of {}", origin, family, known));
  }
  ModelSpec model = parser->second(keys);
  model.family = family;
  complete(model, origin);
  return model;
}

}  // namespace collegium::plan
