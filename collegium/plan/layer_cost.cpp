// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "collegium/plan/account.h"
#include "collegium/plan/collectives.h"
#include "collegium/plan/step_time.h"

namespace collegium::plan {

namespace {

// A product of the score kernels (unfused) has the depth of one head only; its utilisation says the rest.
constexpr double kMinHeadDepth = 8.0;
constexpr double kWideLayers = 4.0;
// Tensor units load 16 bytes at a time; rows of a head that are not a multiple of that need 2, 4 or 8 times
// the loads.
constexpr std::int64_t kAlignedElements = 8;

struct Context {
  const ModelSpec& m;
  const Layout& l;
  const Workload& w;
  const Cluster& c;
  const Stack& s;
  double tokens;             // of the micro-batch on this rank's context share
  std::string format;        // of matrix products
  std::string score_format;  // of attention and the head, which stay in 16 bits where products are narrower

  double gemm(double m_rows, double n, double k, double groups = 1.0) const {
    const double seconds = gemm_seconds(c.accelerator, format, m_rows, n, k, groups);
    if (format != "fp4") return seconds;
    // The published 4-bit recipe keeps the last layers in 16 bits.
    const double share = std::min(1.0, kWideLayers / static_cast<double>(m.layers));
    return (1.0 - share) * seconds + share * gemm_seconds(c.accelerator, score_format, m_rows, n, k, groups);
  }
  double stream(double bytes, double kernels) const {
    return stream_seconds(c.accelerator, bytes) + kernels * c.accelerator.launch_us * 1e-6;
  }
  double sequence_share() const { return l.sequence_parallel ? l.tp : 1.0; }
};

double projection_seconds(const Context& x) {
  const auto hidden = static_cast<double>(x.m.hidden);
  const double tp = x.l.tp;
  if (x.m.latent.kv_rank == 0) {
    const double q = static_cast<double>(x.m.heads * x.m.head_dim);
    const double kv = static_cast<double>(std::max<std::int64_t>(x.m.kv_heads, x.l.tp) * x.m.head_dim);
    return x.gemm(x.tokens, (q + 2.0 * kv) / tp, hidden) + x.gemm(x.tokens, hidden, q / tp);
  }
  const LatentAttention& a = x.m.latent;
  const auto heads = static_cast<double>(x.m.heads);
  const double q_head = static_cast<double>(a.nope_dim + a.rope_dim);
  const auto q_rank = static_cast<double>(a.q_rank);
  const auto kv_rank = static_cast<double>(a.kv_rank);
  double seconds = x.gemm(x.tokens / x.sequence_share(), kv_rank + static_cast<double>(a.rope_dim), hidden);
  seconds += q_rank > 0.0 ? x.gemm(x.tokens / x.sequence_share(), q_rank, hidden) +
                                x.gemm(x.tokens, heads * q_head / tp, q_rank)
                          : x.gemm(x.tokens, heads * q_head / tp, hidden);
  seconds += x.gemm(x.tokens, heads * static_cast<double>(a.nope_dim + a.value_dim) / tp, kv_rank);
  return seconds + x.gemm(x.tokens, hidden, heads * static_cast<double>(a.value_dim) / tp);
}

bool fused(const Context& x) { return x.s.flash_attention && (x.s.fused_sinks || !x.m.attention_sinks); }

double score_flops(const Context& x, bool windowed) {
  const double visible = mean_visible_keys(x.w.seq_len, windowed ? x.m.window : 0);
  const double keys = x.s.causal_skip && fused(x) ? visible : x.w.seq_len;
  return 2.0 * x.tokens * static_cast<double>(x.m.heads * (x.m.q_head_dim() + x.m.value_head_dim())) /
         x.l.tp * keys;
}

double alignment_factor(std::int64_t head_dim) {
  double factor = 1.0;
  if (head_dim % kAlignedElements != 0) factor = 6.0;
  return factor;
}

double attention_seconds(const Context& x, bool windowed, bool backward) {
  const double flops = score_flops(x, windowed) * (backward ? 2.5 : 1.0);
  const Accelerator& a = x.c.accelerator;
  if (fused(x))
    return flops / (peak_flops(a, x.score_format) * x.s.attention_share *
                    (backward ? a.attention_backward : a.attention_forward)) +
           a.launch_us * 1e-6;
  // Two batched products over heads, and softmax, mask and dropout as passes over the scores.
  const double head = std::max(kMinHeadDepth, static_cast<double>(x.m.q_head_dim()));
  const double batches = x.l.micro_batch * static_cast<double>(x.m.heads) / x.l.tp;
  const double rows = x.w.seq_len / x.l.cp;
  // The products of all heads follow each other in one kernel: half of the start-up hides behind the tile
  // before.
  const double depth_gain = (head + kStartDepth) / (head + kStartDepth / 2.0);
  const double products = (gemm_seconds(a, x.score_format, rows, x.w.seq_len, head, batches) / depth_gain +
                           gemm_seconds(a, x.score_format, rows, head, x.w.seq_len, batches)) *
                          alignment_factor(x.m.q_head_dim());
  const double scores = batches * rows * x.w.seq_len;
  const double passes = x.s.dropout_mask_bytes > 0.0 ? 9.0 : 4.0;
  return (backward ? 2.0 : 1.0) * (products + x.stream(passes * scores, 3.0));
}

double elementwise_seconds(const Context& x, bool moe) {
  const auto hidden = static_cast<double>(x.m.hidden);
  const double qkv = static_cast<double>(x.m.heads * x.m.q_head_dim() + 2 * x.m.kv_heads * x.m.head_dim);
  // Two norms (read, write) and two residual additions (two reads, a write, masks).
  const double residual =
      x.tokens * hidden * (8.0 + 12.0 + 2.0 * x.s.dropout_mask_bytes) / x.sequence_share();
  double network = 0.0;
  double kernels = 10.0;
  const double per_width = x.m.gated_ffn ? 6.0 : (x.s.fused_elementwise ? 4.0 : 8.0);
  if (moe) {
    const double rows = x.tokens * x.m.experts_per_token() * x.w.imbalance / x.l.tp;
    // Rows are copied when sent, sorted when received, and both again on the way home.
    network += rows * 16.0 * hidden + rows * per_width * static_cast<double>(x.m.expert_ffn);
    network += x.tokens / x.sequence_share() * static_cast<double>(x.m.experts) * 24.0;
    network += x.tokens / x.l.tp * per_width * static_cast<double>(x.m.shared_ffn);
    kernels += 14.0;
  } else {
    network += x.tokens / x.l.tp * per_width * static_cast<double>(x.m.dense_ffn);
  }
  // Low-precision products read their inputs in 16 bits and write them twice, once transposed for the
  // backward pass.
  if (x.format == "fp8" || x.format == "fp4") {
    const double quantised =
        moe ? x.m.experts_per_token() * x.w.imbalance * (hidden + static_cast<double>(x.m.expert_ffn)) +
                  static_cast<double>(x.m.shared_ffn)
            : hidden + static_cast<double>(x.m.dense_ffn);
    network += 4.0 * x.tokens / x.l.tp * (quantised + qkv);
    kernels += 4.0;
    // Their grouped products want row counts that are multiples of a block: rows are padded and cut again.
    if (moe) network += 8.0 * x.tokens * x.m.experts_per_token() * x.w.imbalance / x.l.tp * hidden;
  }
  const double rotary = x.tokens / x.l.tp * 4.0 * qkv;
  // Unfused stacks read and write once more for biases, masks and casts.
  const double factor = x.s.fused_elementwise ? 1.0 : 1.5;
  return x.stream((residual + rotary + network) * factor * x.s.value_scale, kernels * factor);
}

double network_gemms(const Context& x, bool moe) {
  const auto hidden = static_cast<double>(x.m.hidden);
  const double inner = x.m.gated_ffn ? 2.0 : 1.0;
  double seconds = 0.0;
  const auto network = [&](double width) {
    if (width <= 0.0) return;
    seconds += x.gemm(x.tokens, inner * width / x.l.tp, hidden) + x.gemm(x.tokens, hidden, width / x.l.tp);
  };
  network(static_cast<double>(moe ? x.m.shared_ffn : x.m.dense_ffn));
  if (!moe) return seconds;
  const double local = static_cast<double>(x.m.experts) / x.l.ep;
  const double rows = x.tokens / x.l.tp * x.l.etp * x.m.experts_per_token() * x.w.imbalance / local;
  const double width = static_cast<double>(x.m.expert_ffn) / x.l.etp;
  if (x.s.batched_experts) {
    seconds += x.gemm(rows, inner * width, hidden, local) + x.gemm(rows, hidden, width, local);
  } else {
    seconds += local * (x.gemm(rows, inner * width, hidden) + x.gemm(rows, hidden, width));
  }
  return seconds + x.gemm(x.tokens / x.sequence_share(), static_cast<double>(x.m.experts), hidden);
}

// One pass of collectives of the layer: two reductions (or gather and scatter) of the hidden states.
double tensor_seconds(const Context& x, bool moe) {
  if (x.l.tp == 1 && x.l.cp == 1) return 0.0;
  const double bytes = 2.0 * x.tokens * static_cast<double>(x.m.hidden);
  double seconds = tensor_blocks(x.m, moe) * all_reduce_seconds(x.c, group_of(x.c, x.l.tp, 1), bytes) *
                   (1.0 - x.s.tensor_overlap);
  if (x.l.cp > 1) {
    const double kv = 4.0 * x.tokens * static_cast<double>(x.m.kv_heads * x.m.head_dim) / x.l.tp;
    const double ring = gather_seconds(x.c, group_of(x.c, x.l.cp, x.l.tp), kv * x.l.cp);
    seconds += std::max(0.0, ring - 0.7 * attention_seconds(x, false, false));
  }
  return seconds;
}

double expert_seconds(const Context& x) {
  const double tokens = x.tokens / x.l.tp;
  const double row = 2.0 * x.s.value_scale * static_cast<double>(x.m.hidden) + 4.0;
  double seconds = 2.0 * expert_exchange_seconds(x.m, x.l, x.c, tokens, row, x.w.imbalance);
  if (x.l.etp > 1) {
    const double bytes = tokens * x.l.etp * x.m.experts_per_token() * x.w.imbalance * row;
    seconds += 2.0 * gather_seconds(x.c, group_of(x.c, x.l.etp, 1), bytes);
  }
  return seconds;
}

Context context(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c, const Stack& s) {
  const std::string format = matrix_format(w.precision);
  return {.m = m,
          .l = l,
          .w = w,
          .c = c,
          .s = s,
          .tokens = l.micro_batch * w.seq_len / l.cp,
          .format = format,
          .score_format = format == "fp32" ? format : "bf16"};
}

}  // namespace

double tensor_blocks(const ModelSpec& m, bool moe) { return moe && m.shared_ffn == 0 ? 1.0 : 2.0; }

LayerCost layer_cost(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c, const Stack& s,
                     bool moe, bool windowed) {
  const Context x = context(m, l, w, c, s);
  LayerCost cost;
  cost.forward[Part::kGemm] = projection_seconds(x) + network_gemms(x, moe);
  cost.forward[Part::kAttention] = attention_seconds(x, windowed, false);
  cost.forward[Part::kElementwise] = elementwise_seconds(x, moe);
  cost.forward[Part::kTensorComm] = tensor_seconds(x, moe);
  cost.forward[Part::kExpertComm] = moe ? expert_seconds(x) : 0.0;
  cost.backward = cost.forward;
  cost.backward[Part::kGemm] *= 2.0;
  cost.backward[Part::kAttention] = attention_seconds(x, windowed, true);
  cost.backward[Part::kElementwise] *= 1.6;
  cost.forward[Part::kElementwise] += s.blocked_host_s;
  cost.backward[Part::kElementwise] += s.blocked_host_s;
  const Recompute& r = l.recompute;
  if (r.full) {
    cost.recompute = cost.forward;
  } else {
    if (r.attention_core && !s.flash_attention)
      cost.recompute[Part::kAttention] = cost.forward[Part::kAttention];
    if (r.moe && moe) {
      cost.recompute[Part::kGemm] = network_gemms(x, true);
      cost.recompute[Part::kExpertComm] = cost.forward[Part::kExpertComm];
    }
    if (r.dense_ffn && !moe) cost.recompute[Part::kGemm] = network_gemms(x, false);
    if (r.norms || r.activation || r.latent_up || r.operators)
      cost.recompute[Part::kElementwise] = 0.3 * cost.forward[Part::kElementwise];
  }
  return cost;
}

LayerCost head_cost(const ModelSpec& m, const Layout& l, const Workload& w, const Cluster& c,
                    const Stack& s) {
  const Context x = context(m, l, w, c, s);
  LayerCost cost;
  const double vocab = static_cast<double>(m.vocab) / l.tp;
  // The head stays in 16 bits in every published low-precision recipe.
  cost.forward[Part::kGemm] =
      gemm_seconds(c.accelerator, x.score_format, x.tokens, vocab, static_cast<double>(m.hidden));
  cost.forward[Part::kElementwise] = x.stream(12.0 * x.s.value_scale * x.tokens * vocab, 5.0);
  cost.backward = cost.forward;
  cost.backward[Part::kGemm] *= 2.0;
  return cost;
}

}  // namespace collegium::plan
