// SPDX-License-Identifier: Apache-2.0
// Memory of our own training step: what its tensors are, counted as the program keeps them.
#include <algorithm>

#include "collegium/plan/own_run.h"

namespace collegium::plan {

namespace {

constexpr double kIndex = 4.0;          // int32
constexpr double kLong = 8.0;           // int64
constexpr double kLossTokens = 1024.0;  // whose logits exist at one time

// Sizes of one value: of the compute dtype, and of sums and inner math.
struct Widths {
  double compute = 0.0;
  double wide = 0.0;
};

Widths widths_of(const OwnRun& run) {
  if (run.dtype == "bfloat16") return {.compute = 2.0, .wide = 4.0};
  const double width = run.dtype == "float64" ? 8.0 : 4.0;
  return {.compute = width, .wide = width};
}

// Block input and its norm, q, k, v and the output, log sums; then the sum and its norm.
double attention_bytes(const ModelSpec& m, Widths b) {
  const auto hidden = static_cast<double>(m.hidden);
  const auto all_heads = static_cast<double>((m.heads + m.kv_heads) * m.head_dim);
  double bytes = 4.0 * hidden * b.compute + 2.0 * b.wide + 2.0 * all_heads * b.compute +
                 static_cast<double>(m.heads) * b.wide;
  if (m.qk_norm != SpecQkNorm::kNone) bytes += all_heads * b.compute;
  return bytes;
}

// Rows of this rank's experts, where they lie, and what the router saves.
double experts_bytes(const ModelSpec& m, Widths b, double imbalance) {
  const auto top_k = static_cast<double>(m.top_k);
  const double values = static_cast<double>(m.hidden + 2 * m.expert_ffn);
  const double rows = top_k * imbalance * (values * b.compute + b.wide);
  const double router = 2.0 * static_cast<double>(m.experts) * b.wide +
                        top_k * (2.0 * kIndex + kLong + 4.0 * b.wide) + 2.0 * b.wide;
  return rows + 3.0 * kIndex * top_k + router + 2.0 * static_cast<double>(m.shared_ffn) * b.compute;
}

double values_of_rank(const OwnRun& run) {
  const ModelSpec& m = run.model;
  const double embedding = static_cast<double>(m.vocab * m.hidden);
  double values = embedding * (m.tied_embeddings ? 1.0 : 2.0) + static_cast<double>(norm_weights(m));
  for (std::int64_t layer = 0; layer < m.layers; ++layer) {
    const LayerWeights w = layer_weights(m, layer);
    const std::int64_t held = (w.experts + run.ep - 1) / run.ep;
    values += static_cast<double>(w.attention() + w.norms + w.dense() + w.router + held * w.expert);
  }
  return values;
}

}  // namespace

OwnActivations own_activations(const OwnRun& run, double imbalance) {
  const ModelSpec& m = run.model;
  const Widths b = widths_of(run);
  const auto hidden = static_cast<double>(m.hidden);
  const auto top_k = static_cast<double>(m.top_k);
  OwnActivations sum;
  for (const bool has_experts : m.moe_layers) {
    const double dense = 3.0 * static_cast<double>(m.dense_ffn) * b.compute;
    sum.layers += attention_bytes(m, b) + (has_experts ? experts_bytes(m, b, imbalance) : dense);
    sum.recomputed += hidden * b.compute + (has_experts ? top_k * (2.0 * kIndex + b.wide) : 0.0);
  }
  sum.outside = 3.0 * hidden * b.compute + b.wide + 2.0 * kLong;
  const double rows = top_k * imbalance * static_cast<double>(2 * m.hidden + 3 * m.expert_ffn) * b.compute;
  sum.backward = std::max(rows, 4.0 * static_cast<double>(m.heads * m.head_dim) * (b.compute + b.wide));
  return sum;
}

MemoryReport own_memory(const OwnRun& run, const Cluster& cluster, double imbalance) {
  const Widths b = widths_of(run);
  const Layout layout = own_layout(run);
  const auto tokens = static_cast<double>(layout.micro_batch * run.sequence_length);
  const double values = values_of_rank(run);
  const OwnActivations kept = own_activations(run, imbalance);
  const double layer = kept.layers / static_cast<double>(run.model.layers);
  MemoryReport r;
  const auto add = [&r](const char* name, double bytes) { r.lines.push_back({name, bytes}); };
  add("weights", b.compute * values);
  add("summed gradients", b.wide * values);
  add("optimizer state", (b.compute < b.wide ? 3.0 : 2.0) * b.wide * values);
  add("the program", cluster.accelerator.workspace_gib * 1073741824.0);
  for (const MemoryLine& line : r.lines) r.static_bytes += line.bytes;
  add("activations", tokens * ((run.recompute ? kept.recomputed : kept.layers) + kept.outside));
  // The head's gradient exists from the loss on: first beside logits, then beside what a layer's backward
  // pass needs.
  const double vocab = static_cast<double>(run.model.vocab);
  const double head = static_cast<double>(run.model.hidden) * vocab * (b.wide + b.compute);
  const double again = run.recompute ? layer - kept.recomputed / static_cast<double>(run.model.layers) : 0.0;
  add("loss or a layer's backward pass",
      head + std::max(std::min(tokens, kLossTokens) * vocab * b.compute, tokens * (kept.backward + again)));
  for (const MemoryLine& line : r.lines) r.peak_bytes += line.bytes;
  r.device_bytes = r.peak_bytes;
  return r;
}

}  // namespace collegium::plan
