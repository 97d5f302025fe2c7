// SPDX-License-Identifier: Apache-2.0
// Memory of our own training step: what its tensors are, counted as the program keeps them.
#include <algorithm>
#include <cmath>

#include "collegium/base/units.h"
#include "collegium/plan/own_run.h"

namespace collegium::plan {

namespace {

constexpr double kIndex = 4.0;  // int32
constexpr double kLong = 8.0;   // int64

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
double attention_bytes(const OwnRun& run, Widths b) {
  const ModelSpec& m = run.model;
  const auto hidden = static_cast<double>(m.hidden);
  const auto all_heads = static_cast<double>((m.heads + m.kv_heads) * m.head_dim);
  double bytes = 4.0 * hidden * b.compute + 2.0 * b.wide + 2.0 * all_heads * b.compute +
                 static_cast<double>(m.heads) * b.wide;
  if (m.qk_norm != SpecQkNorm::kNone) bytes += all_heads * b.compute;
  if (run.clipped_qkv) bytes += (all_heads + static_cast<double>(m.kv_heads * m.head_dim)) * b.compute;
  return bytes;
}

// Rows that this rank holds per token of its own, where its experts read them. Without an exchange they are
// the tokens themselves, which the norm before keeps; two_level and allgather hold a token once;
// shared_memory has a copy of this rank's tokens, where all see it.
double held_rows(const OwnRun& run, double imbalance) {
  if (run.ep == 1) return 0.0;
  const double per_token = run.model.experts_per_token();
  const auto ranks = static_cast<double>(run.ep);
  switch (run.exchange) {
    case Exchange::kAllgather:
      return ranks;
    case Exchange::kTwoLevel:
      return ranks * (1.0 - std::pow(1.0 - 1.0 / ranks, per_token));
    case Exchange::kSharedMemory:
      return 1.0;
    case Exchange::kUneven:
    case Exchange::kPadded:
      break;
  }
  return per_token * imbalance;
}

// Of this rank's experts, where their rows lie, and of the router: scores, with some routers logits; per
// choice ids before and after drops and as an index, four weights; per token divisor and log sum.
double experts_bytes(const OwnRun& run, Widths b, double imbalance) {
  const ModelSpec& m = run.model;
  const auto top_k = static_cast<double>(m.top_k);
  const double rows =
      m.experts_per_token() * imbalance * (static_cast<double>(2 * m.expert_ffn) * b.compute + b.wide) +
      held_rows(run, imbalance) * static_cast<double>(m.hidden) * b.compute;
  const double router = (run.kept_logits ? 2.0 : 1.0) * static_cast<double>(m.experts) * b.wide +
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

// Rows that products of weight gradients run over, over the routed ones: bf16 rounds an expert's up to 32,
// and to a 32nd of them above 1024 (ops/weight_gradients.h).
double padding(const OwnRun& run, double imbalance) {
  constexpr double kStep = 32.0;
  if (run.dtype != "bfloat16" || run.widened_products || !run.model.is_moe()) return 1.0;
  const auto tokens = static_cast<double>(own_layout(run).micro_batch * run.sequence_length * run.ep);
  const double rows =
      tokens * run.model.experts_per_token() * imbalance / static_cast<double>(run.model.experts);
  if (rows == 0.0) return 1.0;
  double step = kStep;
  while (rows > kStep * step) step *= 2.0;
  return 1.0 + (step - 1.0) / 2.0 / rows;
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
    sum.layers += attention_bytes(run, b) + (has_experts ? experts_bytes(run, b, imbalance) : dense);
    sum.recomputed += hidden * b.compute + (has_experts ? top_k * (2.0 * kIndex + b.wide) : 0.0);
  }
  sum.outside = 3.0 * hidden * b.compute + b.wide + 2.0 * kLong;
  // The experts' rows: of output or input, of gate and up, and the activation. An upper bound where products
  // read rows by an index (fp32 with AVX2 alone) and copy none.
  const double rows = m.experts_per_token() * imbalance *
                      static_cast<double>(2 * m.hidden + 3 * m.expert_ffn) * b.compute *
                      padding(run, imbalance);
  sum.backward = std::max(rows, 4.0 * static_cast<double>(m.heads * m.head_dim) * b.compute);
  return sum;
}

OwnTensors own_tensors(const OwnRun& run, double imbalance) {
  const Widths b = widths_of(run);
  const auto tokens = static_cast<double>(own_layout(run).micro_batch * run.sequence_length);
  const auto layers = static_cast<double>(run.model.layers);
  const double values = values_of_rank(run);
  const OwnActivations kept = own_activations(run, imbalance);
  OwnTensors t;
  t.weights = b.compute * values;
  t.gradients = b.wide * values;
  t.optimizer = (b.compute < b.wide ? 3.0 : 2.0) * b.wide * values;
  t.activations = tokens * ((run.recompute ? kept.recomputed : kept.layers) + kept.outside);
  // The head's gradient exists from the loss on: first beside logits, then beside what a layer's backward
  // pass needs. When it has reached the first layer, the gradients of all others are there instead of what
  // they kept.
  const double embedding = static_cast<double>(run.model.vocab) * static_cast<double>(run.model.hidden);
  const double head = embedding * (b.compute < b.wide ? b.wide + b.compute : b.wide);
  const double again = run.recompute ? (kept.layers - kept.recomputed) / layers : 0.0;
  const double logits = std::min(tokens, static_cast<double>(run.loss_tokens)) *
                            static_cast<double>(run.model.vocab) * b.compute +
                        (run.widened_products ? b.wide * embedding : 0.0);
  const double last = tokens * (kept.layers / layers + kept.backward) + b.compute * (values - embedding);
  t.transient = std::max(head + std::max(logits, tokens * (kept.backward + again)), last - t.activations);
  return t;
}

MemoryReport own_memory(const OwnRun& run, const Cluster& cluster, double imbalance) {
  const OwnTensors t = own_tensors(run, imbalance);
  MemoryReport r;
  r.add("weights", t.weights);
  r.add("summed gradients", t.gradients);
  r.add("optimizer state", t.optimizer);
  r.add("the program", cluster.accelerator.workspace_gib * kGiB);
  for (const MemoryLine& line : r.lines) r.static_bytes += line.bytes;
  r.add("activations", t.activations);
  r.add("loss or a layer's backward pass", t.transient);
  for (const MemoryLine& line : r.lines) r.peak_bytes += line.bytes;
  r.device_bytes = r.peak_bytes;
  return r;
}

}  // namespace collegium::plan
