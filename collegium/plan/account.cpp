// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/account.h"

#include <algorithm>
#include <cmath>

#include "collegium/base/error.h"

namespace collegium::plan {

namespace {

void add(Account& a, std::string component, std::string formula, std::int64_t total, std::int64_t active) {
  if (total == 0) return;
  a.lines.push_back({std::move(component), std::move(formula), total, active});
  a.total += total;
  a.active += active;
}

std::string attention_formula(const ModelSpec& m) {
  if (m.latent.kv_rank > 0)
    return fmt::format("{} layers: latent ranks {} (query) and {} (key/value), {} heads of {}+{} and {}",
                       m.layers, m.latent.q_rank, m.latent.kv_rank, m.heads, m.latent.nope_dim,
                       m.latent.rope_dim, m.latent.value_dim);
  return fmt::format("{} layers x {} x {} x (2x{} + 2x{}){}", m.layers, m.hidden, m.head_dim, m.heads,
                     m.kv_heads,
                     m.qkv_bias || m.qk_norm != SpecQkNorm::kNone || m.attention_sinks
                         ? " + biases, sinks and norms of q and k"
                         : "");
}

struct Sums {
  std::int64_t attention = 0;
  std::int64_t dense = 0;
  std::int64_t shared = 0;
  std::int64_t router = 0;
  std::int64_t experts = 0;
  std::int64_t active_experts = 0;
  std::int64_t norms = 0;
};

Sums sum_layers(const ModelSpec& m) {
  Sums s;
  for (std::int64_t layer = 0; layer < m.layers; ++layer) {
    const LayerWeights w = layer_weights(m, layer);
    s.attention += w.attention();
    (w.experts > 0 ? s.shared : s.dense) += w.dense();
    s.router += w.router;
    s.experts += w.expert * w.experts;
    if (w.experts > 0)
      s.active_experts += std::llround(static_cast<double>(w.expert) * m.experts_per_token());
    s.norms += w.norms;
  }
  return s;
}

}  // namespace

Account account(const ModelSpec& m) {
  Account a;
  const Sums s = sum_layers(m);
  const std::int64_t embedding = m.vocab * m.hidden;
  const std::int64_t moe = m.num_moe_layers();
  const std::int64_t matrices = m.gated_ffn ? 3 : 2;
  add(a, "embedding", fmt::format("{} x {}{}", m.vocab, m.hidden, m.tied_embeddings ? ", also the head" : ""),
      embedding, embedding);
  add(a, "positions", fmt::format("{} x {}", m.learned_positions, m.hidden), m.learned_positions * m.hidden,
      m.learned_positions * m.hidden);
  add(a, "attention", attention_formula(m), s.attention, s.attention);
  add(a, "dense networks",
      fmt::format("{} layers x {} x {} x {}", m.layers - moe, matrices, m.hidden, m.dense_ffn), s.dense,
      s.dense);
  add(a, "shared experts",
      fmt::format("{} layers x {} x {} x {}{}", moe, matrices, m.hidden, m.shared_ffn,
                  m.shared_gates > 0 ? fmt::format(" + {} x {}", m.shared_gates, m.hidden) : ""),
      s.shared, s.shared);
  add(a, "routers",
      fmt::format("{} layers x {} x {}{}{}", moe, m.hidden, m.experts, m.router_noise ? " x 2 (noise)" : "",
                  m.router_bias ? " + bias" : ""),
      s.router, s.router);
  add(a, "routed experts",
      fmt::format("{} layers x {} of {} experts x {} x {} x {}{}", moe, m.experts_per_token(), m.experts,
                  matrices, m.hidden, m.expert_ffn, m.expert_bias ? " + bias" : ""),
      s.experts, s.active_experts);
  const std::int64_t norms = s.norms + norm_weights(m) * (m.embedding_norm ? 2 : 1);
  add(a, "norms", fmt::format("{} x {}", norms / m.hidden, m.hidden), norms, norms);
  if (!m.tied_embeddings) add(a, "head", fmt::format("{} x {}", m.vocab, m.hidden), embedding, embedding);
  a.active_without_embedding = m.tied_embeddings ? a.active : a.active - embedding;
  a.routed = s.experts;
  a.shared = a.total - a.routed;
  a.selection_bias = m.selection_bias ? moe * m.experts : 0;
  a.mtp = m.mtp_layers * mtp_layer_weights(m);
  return a;
}

double mean_visible_keys(double seq_len, std::int64_t window) {
  const auto w = static_cast<double>(window);
  if (window <= 0 || seq_len <= w) return (seq_len + 1.0) / 2.0;
  return (w * (w + 1.0) / 2.0 + (seq_len - w) * w) / seq_len;
}

double TokenFlops::total() const {
  return attention_projections + attention_scores + dense_ffn + experts + router + head + mtp;
}

namespace {

void add_layer_flops(const ModelSpec& m, const LayerWeights& w, double keys, TokenFlops& f) {
  f.attention_projections += 2.0 * static_cast<double>(w.attention());
  f.attention_scores += 2.0 * static_cast<double>(m.heads * (m.q_head_dim() + m.value_head_dim())) * keys;
  f.dense_ffn += 2.0 * static_cast<double>(w.dense());
  f.router += 2.0 * static_cast<double>(w.router);
  if (w.experts > 0) f.experts += 2.0 * static_cast<double>(w.expert) * m.experts_per_token();
}

}  // namespace

TokenFlops forward_flops_per_token(const ModelSpec& m, double seq_len) {
  TokenFlops f;
  for (std::int64_t layer = 0; layer < m.layers; ++layer) {
    const bool windowed = !m.window_layers.empty() && m.window_layers.at(static_cast<std::size_t>(layer));
    add_layer_flops(m, layer_weights(m, layer), mean_visible_keys(seq_len, windowed ? m.window : 0), f);
  }
  f.head = 2.0 * static_cast<double>(m.vocab * m.hidden);
  if (m.mtp_layers > 0) {
    TokenFlops layer;
    add_layer_flops(m, layer_weights(m, m.layers - 1), mean_visible_keys(seq_len, 0), layer);
    f.mtp = static_cast<double>(m.mtp_layers) *
            (layer.total() + f.head + 4.0 * static_cast<double>(m.hidden) * static_cast<double>(m.hidden));
  }
  return f;
}

}  // namespace collegium::plan
