// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/model_spec.h"

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/plan/embedded.h"

namespace collegium::plan {

namespace {

// Matrices of one feed-forward network of width `width`, its biases by whether tensor parallelism splits
// them.
struct FfnWeights {
  std::int64_t matrices = 0;
  std::int64_t inner_bias = 0;
  std::int64_t output_bias = 0;
};

FfnWeights ffn_weights(const ModelSpec& m, std::int64_t width, bool bias) {
  const std::int64_t inner = m.gated_ffn ? 2 : 1;
  return {.matrices = (inner + 1) * m.hidden * width,
          .inner_bias = bias ? inner * width : 0,
          .output_bias = bias ? m.hidden : 0};
}

void add_plain_attention(const ModelSpec& m, LayerWeights& w) {
  const std::int64_t q = m.heads * m.head_dim;
  const std::int64_t kv = m.kv_heads * m.head_dim;
  w.attention_sharded = m.hidden * (2 * q + 2 * kv);
  if (m.qkv_bias) w.attention_sharded += q + 2 * kv;
  if (m.attention_sinks) w.attention_sharded += m.heads;
  if (m.attention_output_bias) w.attention_replicated += m.hidden;
  if (m.qk_norm == SpecQkNorm::kPerHead) w.attention_replicated += 2 * m.head_dim;
  if (m.qk_norm == SpecQkNorm::kProjection) w.attention_replicated += q + kv;
}

void add_latent_attention(const ModelSpec& m, LayerWeights& w) {
  const LatentAttention& a = m.latent;
  const std::int64_t q = m.heads * (a.nope_dim + a.rope_dim);
  if (a.q_rank > 0) {
    w.attention_replicated += m.hidden * a.q_rank + a.q_rank;
    w.attention_sharded += a.q_rank * q;
  } else {
    w.attention_sharded += m.hidden * q;
  }
  w.attention_replicated += m.hidden * (a.kv_rank + a.rope_dim) + a.kv_rank;
  w.attention_sharded += a.kv_rank * m.heads * (a.nope_dim + a.value_dim);
  w.attention_sharded += m.heads * a.value_dim * m.hidden;
}

LayerWeights weights_of(const ModelSpec& m, bool moe) {
  LayerWeights w;
  if (m.latent.kv_rank > 0) {
    add_latent_attention(m, w);
  } else {
    add_plain_attention(m, w);
  }
  w.norms = 2 * norm_weights(m);
  const std::int64_t width = moe ? m.shared_ffn : m.dense_ffn;
  if (width > 0) {
    const FfnWeights ffn = ffn_weights(m, width, m.ffn_bias);
    w.dense_sharded = ffn.matrices + ffn.inner_bias;
    w.dense_replicated = ffn.output_bias;
  }
  if (moe) {
    w.dense_replicated += m.shared_gates * m.hidden;
    const FfnWeights expert = ffn_weights(m, m.expert_ffn, m.expert_bias);
    w.expert = expert.matrices + expert.inner_bias + expert.output_bias;
    w.experts = m.experts;
    w.router = m.experts * ((m.router_noise ? 2 : 1) * m.hidden + (m.router_bias ? 1 : 0));
  }
  return w;
}

void require_positive_size(std::int64_t value, const std::string& origin, const char* field) {
  require_config(value >= 1, "{}: {} = {}: must be at least 1", origin, field, value);
}

// Counts of weights are whole numbers of 63 bits; a few times as many must fit, too.
void require_countable(const ModelSpec& m, const std::string& origin) {
  constexpr double kMost = 1e17;
  const auto real = [](std::int64_t value) { return static_cast<double>(value); };
  const double heads = real(m.heads) * real(m.q_head_dim() + m.value_head_dim());
  const double networks = real(m.experts) * real(m.expert_ffn) + real(m.shared_ffn) +
                          (m.num_moe_layers() < m.layers ? real(m.dense_ffn) : 0.0);
  const double rank = real(m.latent.kv_rank) + real(m.latent.q_rank);
  const double weights = (2.0 * real(m.vocab) + real(m.learned_positions)) * real(m.hidden) +
                         real(m.layers) * (real(m.hidden) * (3.0 * networks + 2.0 * heads + real(m.experts)) +
                                           rank * (heads + real(m.hidden)));
  require_config(weights < kMost, "{}: its sizes make {:.1e} parameters: must be below {:.0e}", origin,
                 weights, kMost);
}

void check_experts(const ModelSpec& m, const std::string& origin) {
  require_positive_size(m.expert_ffn, origin, "width of an expert");
  require_config(m.top_k >= 1 && m.top_k <= m.experts,
                 "{}: experts per token = {}: must be between 1 and the number of experts = {}", origin,
                 m.top_k, m.experts);
  if (m.routing_groups == 0) return;
  require_config(m.experts % m.routing_groups == 0,
                 "{}: groups of experts (n_group, num_groups) = {}: must divide the number of experts = {}",
                 origin, m.routing_groups, m.experts);
  require_config(m.routing_top_groups >= 1 && m.routing_top_groups <= m.routing_groups,
                 "{}: groups of a token (topk_group, top_groups) = {}: must be between 1 and the groups = {}",
                 origin, m.routing_top_groups, m.routing_groups);
  const std::int64_t reachable = m.experts / m.routing_groups * m.routing_top_groups;
  require_config(m.mean_experts > 0.0 || m.top_k <= reachable,
                 "{}: experts per token = {}: must be at most those of its {} groups = {}", origin, m.top_k,
                 m.routing_top_groups, reachable);
}

}  // namespace

std::int64_t ModelSpec::num_moe_layers() const {
  return std::count(moe_layers.begin(), moe_layers.end(), true);
}

std::int64_t ModelSpec::q_head_dim() const {
  return latent.kv_rank > 0 ? latent.nope_dim + latent.rope_dim : head_dim;
}

std::int64_t ModelSpec::value_head_dim() const { return latent.kv_rank > 0 ? latent.value_dim : head_dim; }

std::int64_t LayerWeights::total() const { return attention() + norms + dense() + router + expert * experts; }

std::int64_t norm_weights(const ModelSpec& model) {
  return model.norm == SpecNorm::kLayer ? 2 * model.hidden : model.hidden;
}

LayerWeights layer_weights(const ModelSpec& model, std::int64_t layer) {
  return weights_of(model, model.is_moe() && model.moe_layers.at(static_cast<std::size_t>(layer)));
}

std::int64_t mtp_layer_weights(const ModelSpec& model) {
  return weights_of(model, model.is_moe()).total() + 3 * norm_weights(model) +
         2 * model.hidden * model.hidden;
}

void complete(ModelSpec& m, const std::string& origin) {
  require_positive_size(m.vocab, origin, "vocabulary");
  require_positive_size(m.hidden, origin, "hidden size");
  require_positive_size(m.layers, origin, "layers");
  require_positive_size(m.heads, origin, "heads");
  if (m.kv_heads == 0) m.kv_heads = m.heads;
  require_config(m.kv_heads >= 1 && m.heads % m.kv_heads == 0,
                 "{}: key/value heads = {} must divide the number of heads = {}", origin, m.kv_heads,
                 m.heads);
  if (m.head_dim == 0) {
    // Published sweeps contain widths that the heads do not divide; the last head is then wider.
    m.head_dim = m.hidden / m.heads;
  }
  require_positive_size(m.head_dim, origin, "head dimension");
  if (m.is_moe()) {
    check_experts(m, origin);
    if (m.moe_layers.empty()) m.moe_layers.assign(static_cast<std::size_t>(m.layers), true);
  } else {
    m.moe_layers.assign(static_cast<std::size_t>(m.layers), false);
  }
  require_config(static_cast<std::int64_t>(m.moe_layers.size()) == m.layers,
                 "{}: {} layers are marked dense or experts, but there are {}", origin, m.moe_layers.size(),
                 m.layers);
  if (m.num_moe_layers() == 0) m.experts = 0;  // no layer has them
  if (m.num_moe_layers() < m.layers)
    require_positive_size(m.dense_ffn, origin, "width of the dense feed-forward network");
  require_countable(m, origin);
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const EmbeddedFile& file : embedded_models()) names.emplace_back(file.name);
  std::sort(names.begin(), names.end());
  return names;
}

ModelSpec load_model(const std::string& name_or_path) {
  for (const EmbeddedFile& file : embedded_models()) {
    if (file.name == name_or_path) {
      ModelSpec model = parse_model(Json::parse(file.text), "model " + name_or_path);
      model.name = name_or_path;
      return model;
    }
  }
  std::filesystem::path path = name_or_path;
  if (is_folder(path)) path /= "config.json";
  if (!path_exists(path)) {
    const std::vector<std::string> names = model_names();
    const auto nearest = nearest_name(name_or_path, names);
    throw ConfigError(fmt::format(
        "--model {}: neither a model of the catalogue nor a file{}; `collegium plan --list` shows "
        "the {} names",
        name_or_path, nearest ? fmt::format(" (did you mean {}?)", *nearest) : "", names.size()));
  }
  ModelSpec model = parse_model(read_json_file(path), path.string());
  model.name =
      path.filename() == "config.json" ? path.parent_path().filename().string() : path.stem().string();
  return model;
}

}  // namespace collegium::plan
