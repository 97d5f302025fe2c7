// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/config.h"

#include <algorithm>
#include <limits>
#include <map>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/model/families/family.h"

namespace collegium::model {

std::optional<std::string> not_of_family(const ModelConfig& config) {
  switch (config.family) {
    case Family::kMixtral:
      return not_mixtral(config);
    case Family::kOlmoe:
      return not_olmoe(config);
    case Family::kQwen3Moe:
      return not_qwen3_moe(config);
    case Family::kCollegium:
      break;
  }
  return std::nullopt;
}

namespace {

void write_family(const ModelConfig& config, Json& json) {
  switch (config.family) {
    case Family::kMixtral:
      return write_mixtral(config, json);
    case Family::kOlmoe:
      return write_olmoe(config, json);
    case Family::kQwen3Moe:
      return write_qwen3_moe(config, json);
    case Family::kCollegium:
      break;
  }
}

// The options that only training needs, beside the family's own keys, which say what the model computes.
void read_training_options(const Json& json, const std::string& origin, ModelConfig& config) {
  const Json by_family = write_fields(config.moe).flatten();
  read_fields(json, origin + ": collegium", config.moe);
  if (const auto reason = not_of_family(config)) {
    throw ConfigError(fmt::format("{}: collegium: the model is not of family {}: {}", origin,
                                  enum_name(config.family), *reason));
  }
  Json keys;
  write_family(config, keys);
  const Json given = write_fields(config.moe).flatten();
  const Json needed = write_fields(parse_model_config(keys, origin).moe).flatten();
  for (const auto& [pointer, value] : by_family.items()) {
    std::string key = pointer;
    std::replace(key.begin(), key.end(), '/', '.');
    require_config(needed[pointer] == value, "{}: collegium{} = {}: the family's own keys say {}", origin,
                   key, given[pointer].dump(), value.dump());
  }
}

}  // namespace

void require_listable(const ModelConfig& c) {
  constexpr std::int64_t kMaxLayers = 10000;
  require_config(c.num_layers <= kMaxLayers, "model.num_layers = {}: must be at most {}", c.num_layers,
                 kMaxLayers);
}

void complete(ModelConfig& config) {
  require_listable(config);
  if (config.num_kv_heads == 0) config.num_kv_heads = config.num_heads;
  if (config.head_dim == 0 && config.num_heads > 0) {
    require_config(config.hidden_size % config.num_heads == 0,
                   "model.hidden_size = {}: must be a multiple of num_heads = {} where head_dim is not given",
                   config.hidden_size, config.num_heads);
    config.head_dim = config.hidden_size / config.num_heads;
  }
  if (config.moe_layers.empty() && config.num_layers > 0) {
    config.moe_layers.assign(static_cast<std::size_t>(config.num_layers), true);
  }
}

ModelConfig parse_model_config(const Json& json, const std::string& origin) {
  require_config(json.is_object() && json.contains("model_type") && json["model_type"].is_string(),
                 "{}: needs a model_type (mixtral, olmoe, qwen3_moe or collegium_moe)", origin);
  const auto type = json["model_type"].get<std::string>();
  const HfReader reader(json, origin);
  ModelConfig config;
  if (type == "mixtral") {
    config = parse_mixtral(reader);
  } else if (type == "olmoe") {
    config = parse_olmoe(reader);
  } else if (type == "qwen3_moe") {
    config = parse_qwen3_moe(reader);
  } else if (type == "collegium_moe") {
    require_config(reader.has("collegium"), "{}: a collegium_moe model needs the key 'collegium'", origin);
    read_fields(json["collegium"], origin + ": collegium", config);
    config.output_router_logits = reader.get("output_router_logits", false);
    config.router_aux_loss_coef = reader.get("router_aux_loss_coef", config.router_aux_loss_coef);
    config.source = json;
  } else {
    throw ConfigError(fmt::format(
        "{}: model_type = \"{}\": must be one of mixtral, olmoe, qwen3_moe, collegium_moe", origin, type));
  }
  complete(config);
  if (type != "collegium_moe" && reader.has("collegium"))
    read_training_options(json["collegium"], origin, config);
  return config;
}

namespace {

std::vector<std::int64_t> parse_eos_ids(const Json& json, const std::string& origin) {
  const std::string path = origin + ": eos_token_id";
  const auto found = json.find("eos_token_id");
  std::vector<std::int64_t> ids;
  if (found == json.end() || found->is_null()) return ids;
  if (found->is_array()) {
    read_fields(*found, path, ids);
  } else {
    read_fields(*found, path, ids.emplace_back());
  }
  return ids;
}

}  // namespace

ModelConfig read_model_config(const std::filesystem::path& path) {
  const auto file = is_folder(path) ? path / "config.json" : path;
  return parse_model_config(read_json_file(file), file.string());
}

std::vector<std::int64_t> read_eos_ids(const std::filesystem::path& directory, const ModelConfig& config) {
  // transformers leaves keys out of config.json that are as its class has them.
  static const std::map<Family, std::int64_t> class_defaults = {{Family::kMixtral, 2},
                                                                {Family::kOlmoe, 50279}};
  const std::filesystem::path file = directory / "generation_config.json";
  std::vector<std::int64_t> ids;
  if (path_exists(file)) ids = parse_eos_ids(read_json_file(file), file.string());
  if (!ids.empty()) return ids;
  if (!config.source.contains("eos_token_id") && class_defaults.contains(config.family))
    return {class_defaults.at(config.family)};
  return parse_eos_ids(config.source, (directory / "config.json").string());
}

Json write_model_config(const ModelConfig& config, const std::string& dtype_name) {
  Json json = config.source;
  for (const char* key : {"torch_dtype", "rope_scaling", "num_experts", "num_local_experts", "collegium"})
    json.erase(key);
  json["dtype"] = dtype_name;
  json["torch_dtype"] = dtype_name;
  if (config.family == Family::kCollegium || not_of_family(config)) {
    json["model_type"] = "collegium_moe";
    json["architectures"] = Json::array();
    json["collegium"] = write_fields(config);
    json["output_router_logits"] = config.output_router_logits;
    json["router_aux_loss_coef"] = config.router_aux_loss_coef;
    return json;
  }
  write_family(config, json);
  // What only training needs, when it differs from what the family's own keys say.
  const Json options = write_fields(config.moe);
  if (options != write_fields(parse_model_config(json, "config.json").moe)) json["collegium"] = options;
  return json;
}

void validate(const ModelConfig& c, bool training) {
  const std::pair<const char*, std::int64_t> sizes[] = {
      {"vocab_size", c.vocab_size},      {"hidden_size", c.hidden_size}, {"num_layers", c.num_layers},
      {"num_heads", c.num_heads},        {"head_dim", c.head_dim},       {"num_kv_heads", c.num_kv_heads},
      {"max_positions", c.max_positions}};
  for (const auto& [name, value] : sizes)
    require_config(value >= 1 && value <= std::numeric_limits<std::int32_t>::max(),
                   "model.{} = {}: must be at least 1 and below 2^31", name, value);
  require_config(c.num_heads % c.num_kv_heads == 0, "model.num_kv_heads = {}: must divide num_heads = {}",
                 c.num_kv_heads, c.num_heads);
  require_config(c.head_dim % 2 == 0, "model.head_dim = {}: the rotary embedding needs an even number",
                 c.head_dim);
  require_config(c.padding_id >= -1 && c.padding_id < c.vocab_size,
                 "model.padding_id (pad_token_id) = {}: must lie in [0, vocab_size = {}), or be -1 for none",
                 c.padding_id, c.vocab_size);
  require_config(c.rope_theta > 0.0, "model.rope_theta = {}: must be positive", c.rope_theta);
  require_config(c.norm_eps > 0.0, "model.norm_eps = {}: must be positive", c.norm_eps);
  require_config(c.initializer_range > 0.0, "model.initializer_range = {}: must be positive",
                 c.initializer_range);
  require_config(c.clip_qkv >= 0.0, "model.clip_qkv = {}: must not be negative (0 = off)", c.clip_qkv);
  require_config(c.sliding_window >= 0, "model.sliding_window = {}: must not be negative", c.sliding_window);
  require_config(static_cast<std::int64_t>(c.moe_layers.size()) == c.num_layers,
                 "model.moe_layers has {} entries: must have one for each of the num_layers = {}",
                 c.moe_layers.size(), c.num_layers);
  bool any_moe = false;
  for (const bool is_moe : c.moe_layers) {
    any_moe = any_moe || is_moe;
    require_config(is_moe || c.dense_ffn_size >= 1, "model.dense_ffn_size = {}: dense layers need at least 1",
                   c.dense_ffn_size);
    constexpr std::int64_t kMaxWidth = std::int64_t{1} << 31;
    require_config(is_moe || c.dense_ffn_size < kMaxWidth, "model.dense_ffn_size = {}: must be below 2^31",
                   c.dense_ffn_size);
  }
  if (any_moe) moe::validate(c.moe, "model.moe", /*causal=*/true, training);
}

std::int64_t layer_number(const ModelConfig& config, std::size_t moe_layer) {
  std::size_t seen = 0;
  for (std::size_t layer = 0; layer < config.moe_layers.size(); ++layer) {
    if (config.moe_layers[layer] && seen++ == moe_layer) return static_cast<std::int64_t>(layer);
  }
  return -1;
}

}  // namespace collegium::model
