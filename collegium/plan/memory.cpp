// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/memory.h"

#include <algorithm>
#include <cmath>

#include "collegium/base/units.h"

namespace collegium::plan {

namespace {

double padded_vocab(const ModelSpec& m, int tp) {
  const double block = 128.0 * tp;
  return std::ceil(static_cast<double>(m.vocab) / block) * block;
}

// A boundary of balanced stages: embedding and head weigh as much as the layers they equal in parameters.
std::int64_t balanced_boundary(const ModelSpec& m, const Layout& l, int stage) {
  const double layer = static_cast<double>(layer_weights(m, m.layers - 1).total());
  const double edge = static_cast<double>(m.vocab * m.hidden) / layer;
  const double share = (static_cast<double>(m.layers) + 2.0 * edge) / l.pp;
  const auto at = static_cast<std::int64_t>(std::llround(share * stage - edge));
  return std::clamp<std::int64_t>(at, 0, m.layers);
}

}  // namespace

std::pair<std::int64_t, std::int64_t> stage_layers(const ModelSpec& m, const Layout& l, const Stack& stack,
                                                   int stage) {
  if (stack.balanced_stages && l.pp > 1) {
    const std::int64_t first = stage == 0 ? 0 : balanced_boundary(m, l, stage);
    const std::int64_t last = stage == l.pp - 1 ? m.layers : balanced_boundary(m, l, stage + 1);
    return {first, last};
  }
  // The remainder goes to the first stages: the last one also has the head.
  const std::int64_t base = m.layers / l.pp;
  const std::int64_t more = m.layers % l.pp;
  const std::int64_t first = stage * base + std::min<std::int64_t>(stage, more);
  return {first, first + base + (stage < more ? 1 : 0)};
}

StageWeights stage_weights(const ModelSpec& m, const Layout& l, const Stack& stack, int stage) {
  StageWeights w;
  const auto [first, last] = stage_layers(m, l, stack, stage);
  const double tp = l.tp;
  const auto add_layer = [&](const LayerWeights& layer, double times) {
    w.dense += times * (static_cast<double>(layer.attention_sharded + layer.dense_sharded) / tp +
                        static_cast<double>(layer.attention_replicated + layer.dense_replicated +
                                            layer.norms + layer.router));
    w.experts += times * static_cast<double>(layer.expert * layer.experts) / (l.ep * l.etp);
  };
  for (std::int64_t layer = first; layer < last; ++layer) {
    const LayerWeights weights = layer_weights(m, layer);
    add_layer(weights, 1.0);
    w.moe_layers += weights.experts > 0 ? 1.0 : 0.0;
  }
  w.layers = static_cast<double>(last - first);
  const double embedding = padded_vocab(m, l.tp) * static_cast<double>(m.hidden) / tp;
  if (stage == 0) w.dense += embedding + static_cast<double>(m.learned_positions * m.hidden);
  if (stage == l.pp - 1) {
    w.dense += static_cast<double>(norm_weights(m));
    if (!m.tied_embeddings || l.pp > 1) w.dense += embedding;
    if (m.mtp_layers > 0) {
      const auto times = static_cast<double>(m.mtp_layers);
      add_layer(layer_weights(m, m.layers - 1), times);
      w.dense += times * 2.0 * static_cast<double>(m.hidden * m.hidden) / tp;
      if (l.pp > 1) w.dense += embedding;
      w.layers += times;
      w.moe_layers += m.is_moe() ? times : 0.0;
    }
  }
  return w;
}

std::vector<int> held_stages(const Layout& l, int stage) {
  if (l.stage_copies() == 1) return {stage};
  return {stage, l.pp - 1 - stage};
}

StageWeights held_weights(const ModelSpec& m, const Layout& l, const Stack& stack, int stage) {
  StageWeights sum;
  for (const int held : held_stages(l, stage)) {
    const StageWeights w = stage_weights(m, l, stack, held);
    sum.dense += w.dense;
    sum.experts += w.experts;
    sum.layers += w.layers;
    sum.moe_layers += w.moe_layers;
  }
  return sum;
}

namespace {

struct Bytes {
  double attention = 0.0;
  double dense = 0.0;
  double moe = 0.0;
};

// Inputs of matrix products wait for the backward pass in the products' own format.
double linear_input_bytes(const Workload& w) {
  const std::string format = matrix_format(w.precision);
  // Values that tf32 multiplies lie in memory as fp32.
  if (format == "fp32") return 4.0;
  return format == "bf16" ? 2.0 : 1.0;
}

double attention_bytes(const ModelSpec& m, const Layout& l, const Workload& w, const Stack& stack,
                       bool keep_all) {
  const double tp = l.tp;
  const double sp = l.sequence_parallel ? tp : 1.0;
  const auto hidden = static_cast<double>(m.hidden);
  const double q = static_cast<double>(m.heads * m.q_head_dim());
  const double v = static_cast<double>(m.heads * m.value_head_dim());
  const double kv = m.latent.kv_rank > 0 ? q + v : 2.0 * static_cast<double>(m.kv_heads * m.head_dim);
  double bytes = 2.0 * hidden / sp;  // the norm's input
  const double input = linear_input_bytes(w);
  const bool norms = l.recompute.norms || l.recompute.operators;
  if (keep_all || !norms) bytes += input * hidden / sp;  // its output, input of the projections
  bytes += stack.dropout_mask_bytes * hidden / sp;
  const bool recompute_up = !keep_all && l.recompute.latent_up && m.latent.kv_rank > 0;
  bytes += recompute_up ? 0.0 : 2.0 * (q + kv) / tp;
  bytes += input * v / tp;
  if (m.latent.kv_rank > 0)
    bytes += 4.0 * static_cast<double>(m.latent.q_rank + m.latent.kv_rank + m.latent.rope_dim);
  if (!stack.flash_attention && (keep_all || !l.recompute.attention_core)) {
    // Softmax, and with dropout its mask and result.
    const double per_score = stack.dropout_mask_bytes > 0.0 ? 5.0 : 2.0;
    bytes += per_score * static_cast<double>(m.heads) * w.seq_len / l.cp / tp;
  }
  return bytes;
}

// What the first products leave (2 bytes each) and what the last one reads.
double network_bytes(const ModelSpec& m, const Workload& w, double width, bool keep_activation) {
  return ((m.gated_ffn ? 4.0 : 2.0) + (keep_activation ? linear_input_bytes(w) : 0.0)) * width;
}

// Per token of this rank's share before experts are reached: norm, router, and the rows of its experts.
double moe_bytes(const ModelSpec& m, const Layout& l, const Workload& w, const Stack& stack, bool keep_all) {
  const double tp = l.tp;
  const double sp = l.sequence_parallel ? tp : 1.0;
  const auto hidden = static_cast<double>(m.hidden);
  double bytes = 4.0 * hidden / sp + stack.dropout_mask_bytes * hidden / sp;
  if (!keep_all && l.recompute.moe) return bytes;
  bytes += 8.0 * static_cast<double>(m.experts) / sp;
  // Rows per token of the rank's own share; a fuller rank receives more.
  const double rows = m.experts_per_token() * w.imbalance / tp * l.etp;
  const bool keep = keep_all || !(l.recompute.activation || l.recompute.operators);
  const double row = (2.0 + linear_input_bytes(w)) * hidden +
                     network_bytes(m, w, static_cast<double>(m.expert_ffn), keep) / l.etp;
  bytes += rows * row;
  if (m.shared_ffn > 0) bytes += network_bytes(m, w, static_cast<double>(m.shared_ffn), keep) / tp;
  return bytes;
}

double dense_bytes(const ModelSpec& m, const Layout& l, const Workload& w, const Stack& stack,
                   bool keep_all) {
  const double sp = l.sequence_parallel ? l.tp : 1.0;
  double bytes = 2.0 * static_cast<double>(m.hidden) / sp +
                 stack.dropout_mask_bytes * static_cast<double>(m.hidden) / sp;
  const bool norms = l.recompute.norms || l.recompute.operators;
  if (keep_all || !norms) bytes += linear_input_bytes(w) * static_cast<double>(m.hidden) / sp;
  const bool keep = keep_all || !l.recompute.operators;
  if (keep_all || !l.recompute.dense_ffn)
    bytes += network_bytes(m, w, static_cast<double>(m.dense_ffn), keep) / l.tp;
  return bytes;
}

Bytes token_bytes(const ModelSpec& m, const Layout& l, const Workload& w, const Stack& stack, bool keep_all) {
  Bytes b;
  b.attention = attention_bytes(m, l, w, stack, keep_all);
  b.dense = dense_bytes(m, l, w, stack, keep_all);
  b.moe = m.is_moe() ? moe_bytes(m, l, w, stack, keep_all) : 0.0;
  return b;
}

}  // namespace

LayerActivations layer_activations(const ModelSpec& m, const Layout& l, const Workload& w,
                                   const Stack& stack) {
  const double tokens = l.micro_batch * w.seq_len / l.cp;
  LayerActivations a;
  if (l.recompute.full) {
    const double kept = 2.0 * static_cast<double>(m.hidden) / (l.sequence_parallel ? l.tp : 1.0);
    const Bytes all = token_bytes(m, l, w, stack, true);
    a.dense = a.moe = kept * tokens;
    a.working = (all.attention + std::max(all.dense, all.moe)) * tokens;
    return a;
  }
  const Bytes b = token_bytes(m, l, w, stack, false);
  a.dense = (b.attention + b.dense) * tokens;
  a.moe = (b.attention + b.moe) * tokens;
  return a;
}

double layers_in_flight(const Layout& l, double micro_batches, int stage, double layers) {
  if (l.pp == 1) return l.schedule == Schedule::kGPipe ? micro_batches * layers : layers;
  switch (l.schedule) {
    case Schedule::kGPipe:
      return micro_batches * layers;
    case Schedule::kZeroBubble:
      return std::min<double>(micro_batches, l.pp) * layers;
    case Schedule::kDualPipe:
      return std::min(micro_batches / 2.0, static_cast<double>(l.pp - stage)) * layers;
    case Schedule::k1F1B:
    case Schedule::kInterleaved:
      break;
  }
  if (l.virtual_stages == 1) return std::min<double>(micro_batches, l.pp - stage) * layers;
  const double chunks = (l.pp - stage - 1) * 2.0 + (l.virtual_stages - 1.0) * l.pp + 1.0;
  return std::min(chunks, micro_batches * l.virtual_stages) * layers / l.virtual_stages;
}

namespace {

double expert_buffers(const ModelSpec& m, const Layout& l, const Workload& w) {
  if (!m.is_moe() || l.ep == 1) return 0.0;
  const double tokens = l.micro_batch * w.seq_len / l.cp / l.tp;
  const double row = 2.0 * static_cast<double>(m.hidden);
  const double rows = tokens * m.experts_per_token() * w.imbalance;
  switch (l.dispatcher) {
    case Dispatcher::kAllGather:
      return tokens * l.ep * row;
    case Dispatcher::kSharedMemory:
      return tokens * row;
    case Dispatcher::kPadded:
      return 2.0 * rows * row;
    case Dispatcher::kDeduplicated:
    case Dispatcher::kHierarchical:
    case Dispatcher::kAllToAll:
      return rows * row;
  }
  return 0.0;
}

struct StateBytes {
  double weights = 0.0;
  double gradients = 0.0;
  double optimizer = 0.0;
};

StateBytes state_bytes(const StageWeights& w, const Layout& l, const Stack& stack) {
  const auto shards = [&](int replicas) {
    return std::max(1.0, static_cast<double>(replicas) / stack.optimizer_instances);
  };
  const double dense_shard = shards(l.replicas());
  const double expert_shard = shards(l.expert_replicas());
  const auto shared_by = [&](Zero from, double bytes) {
    if (l.zero < from) return bytes * (w.dense + w.experts);
    return bytes * (w.dense / dense_shard + w.experts / expert_shard);
  };
  // Fully sharded stacks keep no low-precision copy: the master shard is cast when it is gathered.
  const double weights = l.zero == Zero::kSharded ? 0.0 : stack.weight_bytes;
  return {.weights = shared_by(Zero::kSharded, weights),
          .gradients = shared_by(Zero::kGradients, stack.gradient_bytes),
          .optimizer = shared_by(Zero::kOptimizer, stack.optimizer_bytes)};
}

// What forward passes of the stages that a rank holds leave for their backward passes.
void add_activations(const ModelSpec& m, const Layout& l, const Workload& w, const Stack& stack,
                     MemoryReport& r) {
  const LayerActivations acts = layer_activations(m, l, w, stack);
  double depth = 0.0;
  double dense = 0.0;
  double moe = 0.0;
  for (const int held : held_stages(l, r.stage)) {
    const StageWeights weights = stage_weights(m, l, stack, held);
    const double own_depth = layers_in_flight(l, num_micro_batches(l, w), held, 1.0);
    depth += own_depth;
    dense += own_depth * (weights.layers - weights.moe_layers);
    moe += own_depth * weights.moe_layers;
  }
  r.add("activations of dense layers", dense * acts.dense);
  r.add("activations of MoE layers", moe * acts.moe);
  if (stack.keeps_stage_edges && l.pp > 1) {
    const double edge = 2.0 * l.micro_batch * w.seq_len / l.cp * static_cast<double>(m.hidden);
    r.add("inputs and outputs of the stage", 2.0 * (depth + 1.0) * edge);
  }
  if (l.recompute.full) r.add("layer being recomputed", acts.working);
}

}  // namespace

MemoryReport stage_memory(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& cluster,
                          const Stack& stack, int stage) {
  const StageWeights weights = held_weights(m, l, stack, stage);
  const StateBytes state = state_bytes(weights, l, stack);
  const double tokens = l.micro_batch * w.seq_len / l.cp;
  const std::vector<int> held = held_stages(l, stage);
  const auto holds = [&](int which) { return std::find(held.begin(), held.end(), which) != held.end(); };
  MemoryReport r;
  r.stage = stage;
  r.add("weights", state.weights);
  r.add("gradients", state.gradients);
  r.add("optimizer state", state.optimizer);
  if (stack.bucket_bytes > 0.0) r.add("reduction buckets", stack.bucket_bytes);
  const double grouped =
      m.is_moe() && stack.grouped_experts ? cluster.accelerator.grouped_workspace_gib : 0.0;
  r.add("library workspaces", (cluster.accelerator.workspace_gib + grouped) * kGiB);
  for (const MemoryLine& line : r.lines) r.static_bytes += line.bytes;
  add_activations(m, l, w, stack, r);
  if (weights.moe_layers > 0.0) r.add("dispatch buffers", expert_buffers(m, l, w));
  if (l.zero == Zero::kSharded) {
    const double layer = (weights.dense + weights.experts) / std::max(1.0, weights.layers);
    r.add("gathered layers (two)", 2.0 * layer * (stack.weight_bytes + stack.reduce_bytes));
  }
  if (holds(0) && l.pp > 1) r.add("embedded tokens", 2.0 * tokens * static_cast<double>(m.hidden) / l.tp);
  if (holds(l.pp - 1)) {
    // Low-precision logits, and the fp32 copy that the softmax leaves for its backward.
    r.add("logits",
          6.0 * tokens * static_cast<double>(m.vocab) / l.tp * (1.0 + static_cast<double>(m.mtp_layers)));
  }
  for (const MemoryLine& line : r.lines) r.peak_bytes += line.bytes;
  r.device_bytes = r.peak_bytes * (1.0 + stack.fragmentation) + context_bytes(cluster);
  return r;
}

MemoryReport worst_memory(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& cluster,
                          const Stack& stack) {
  MemoryReport worst = stage_memory(m, l, w, cluster, stack, 0);
  for (const int stage : {1, l.pp - 1}) {
    if (stage <= 0 || stage >= l.pp) continue;
    MemoryReport other = stage_memory(m, l, w, cluster, stack, stage);
    if (other.peak_bytes > worst.peak_bytes) worst = std::move(other);
  }
  return worst;
}

double context_bytes(const Cluster& cluster) { return cluster.cores_per_rank > 0 ? 0.0 : kContextBytes; }

bool fits(const MemoryReport& report, const Cluster& cluster) {
  // Near the limit the allocator gives its cache back before it fails: what must fit is what is allocated.
  return report.peak_bytes + context_bytes(cluster) <= cluster.accelerator.memory_gib * kGiB;
}

}  // namespace collegium::plan
