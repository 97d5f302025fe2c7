// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/activation_bytes.h"

#include <algorithm>

namespace collegium::model {

namespace {

// Sizes of one value.
struct Widths {
  double compute = 0.0;  // bytes of the compute dtype
  double wide = 0.0;     // of its inner math: fp32, or fp64 for fp64
};

constexpr double kIndex = 4.0;  // int32
constexpr double kLong = 8.0;

double attention_bytes(const ModelConfig& c, Widths b) {
  const auto heads = static_cast<double>(c.num_heads);
  const auto kv_heads = static_cast<double>(c.num_kv_heads);
  const auto head_dim = static_cast<double>(c.head_dim);
  const auto hidden = static_cast<double>(c.hidden_size);
  const double queries_and_keys = (heads + kv_heads) * head_dim;
  // Input and its norm, q, k, v and the output, log sums.
  double bytes = 2 * hidden * b.compute + b.wide +
                 (queries_and_keys + (heads + kv_heads) * head_dim) * b.compute + heads * b.wide;
  if (c.qk_norm != QkNorm::kNone) bytes += queries_and_keys * b.compute;
  if (c.clip_qkv > 0.0) bytes += (queries_and_keys + kv_heads * head_dim) * b.compute;
  return bytes;
}

double experts_bytes(const moe::MoeOptions& o, double hidden, Widths b) {
  const auto experts = static_cast<double>(o.num_experts);
  const auto top_k = static_cast<double>(o.top_k);
  const auto ffn = static_cast<double>(o.ffn_size);
  const double rows = top_k * (hidden * b.compute + 2 * ffn * b.compute + b.wide);
  const double places = 3 * kIndex * top_k;
  // Logits and scores; per choice: ids before and after drops and as an index, four weights; per token:
  // divisor and log sum.
  const double router = 2 * experts * b.wide + top_k * (2 * kIndex + kLong + 4 * b.wide) + 2 * b.wide;
  const auto shared_ffn = static_cast<double>(o.shared_expert.ffn_size);
  const double shared = o.shared_expert.kind != moe::SharedExpert::kNone ? 2 * shared_ffn * b.compute : 0.0;
  return rows + places + router + shared;
}

}  // namespace

ActivationBytes activation_bytes(const ModelConfig& c, c10::ScalarType dtype) {
  const bool is_double = dtype == c10::ScalarType::Double;
  const Widths b{.compute = static_cast<double>(c10::elementSize(dtype)), .wide = is_double ? 8.0 : 4.0};
  const auto hidden = static_cast<double>(c.hidden_size);
  const auto top_k = static_cast<double>(c.moe.top_k);
  const auto num_layers = static_cast<double>(c.num_layers);
  ActivationBytes sum;
  for (const bool has_experts : c.moe_layers) {
    const auto dense_ffn = static_cast<double>(c.dense_ffn_size);
    // After the attention: the sum with the block's input, and its norm.
    sum.layer += attention_bytes(c, b) + 2 * hidden * b.compute + b.wide +
                 (has_experts ? experts_bytes(c.moe, hidden, b) : 3 * dense_ffn * b.compute);
    sum.recomputed += hidden * b.compute + (has_experts ? top_k * (2 * kIndex + b.wide) : 0.0);
  }
  sum.layer /= num_layers;
  sum.recomputed /= num_layers;
  sum.outside = 3 * hidden * b.compute + b.wide + 2 * kLong;
  // The experts' rows: gradients of output and input, of gate and up, and the activation.
  const double rows = top_k * (2 * hidden + 3 * static_cast<double>(c.moe.ffn_size)) * b.compute;
  const double attention = 4 * static_cast<double>(c.num_heads * c.head_dim) * (b.compute + b.wide);
  sum.backward = std::max(rows, attention);
  return sum;
}

}  // namespace collegium::model
