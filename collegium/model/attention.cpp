// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/attention.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/scaled_dot_product_attention.h>

#include <utility>

#include "collegium/model/causal_attention.h"
#include "collegium/model/linear.h"
#include "collegium/model/norm.h"
#include "collegium/ops/product.h"

namespace collegium::model {

namespace {

// [B, S, D] -> [B, S, n, A], normalised and clipped as the family does it.
at::Tensor project(const ModelConfig& c, const at::Tensor& x_BSD, const at::Tensor& weight,
                   const at::Tensor& norm, std::int64_t num_heads) {
  at::Tensor y = model::linear(x_BSD, weight);
  if (norm.defined() && c.qk_norm == QkNorm::kProjection) y = rms_norm(y, norm, c.norm_eps);
  if (c.clip_qkv > 0.0) y = at::clamp(y, -c.clip_qkv, c.clip_qkv);
  y = y.view({y.size(0), y.size(1), num_heads, c.head_dim});
  if (norm.defined() && c.qk_norm == QkNorm::kPerHead) y = rms_norm(y, norm, c.norm_eps);
  return y;
}

at::Tensor repeat_heads(const at::Tensor& x_BJCA, std::int64_t times) {
  return times == 1 ? x_BJCA : at::repeat_interleave(x_BJCA, times, 1);
}

at::Tensor mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
               const AttentionContext& context) {
  const bool plain = !context.mask.defined() && context.causal && q.size(2) == k.size(2);
  if (plain && q.is_cpu()) return causal_attention(q, k, v);
  const std::int64_t times = q.size(1) / k.size(1);
  const std::optional<at::Tensor> mask = context.mask.defined() ? std::optional(context.mask) : std::nullopt;
  const at::ScalarType wide = ops::product_dtype(q);
  return at::scaled_dot_product_attention(q.to(wide), repeat_heads(k.to(wide), times),
                                          repeat_heads(v.to(wide), times), mask,
                                          /*dropout_p=*/0.0, !mask && context.causal)
      .to(q.scalar_type());
}

}  // namespace

AttentionContext attention_context(const ModelConfig& config, std::int64_t past, std::int64_t num_queries,
                                   const at::Tensor& document_ids_BS, const at::TensorOptions& options) {
  AttentionContext context;
  context.rotary = rotary_tables(past, num_queries, config.head_dim, config.rope_theta, options);
  const std::int64_t num_keys = past + num_queries;
  const bool window = config.sliding_window > 0 && num_keys > config.sliding_window;
  context.causal = num_queries > 1;
  if (!window && !document_ids_BS.defined() && (past == 0 || num_queries == 1)) return context;
  const at::Tensor query = at::arange(past, num_keys, options.dtype(at::kLong)).unsqueeze(1);
  const at::Tensor key = at::arange(num_keys, options.dtype(at::kLong)).unsqueeze(0);
  at::Tensor visible = key <= query;
  if (window) visible = visible.logical_and(query - key < config.sliding_window);
  visible = visible.view({1, 1, num_queries, num_keys});
  if (document_ids_BS.defined()) {
    const at::Tensor same = document_ids_BS.unsqueeze(2) == document_ids_BS.unsqueeze(1);
    visible = visible.logical_and(same.unsqueeze(1));
  }
  context.mask = std::move(visible);
  return context;
}

at::Tensor attention(const ModelConfig& config, const AttentionWeights& weights, const at::Tensor& x_BSD,
                     const AttentionContext& context, LayerCache* cache) {
  // The head dim moves in front of the positions by strides alone; the attention kernel takes it so.
  const at::Tensor q =
      apply_rotary(project(config, x_BSD, weights.q, weights.q_norm, config.num_heads), context.rotary)
          .transpose(1, 2);
  at::Tensor k =
      apply_rotary(project(config, x_BSD, weights.k, weights.k_norm, config.num_kv_heads), context.rotary)
          .transpose(1, 2);
  at::Tensor v = project(config, x_BSD, weights.v, {}, config.num_kv_heads).transpose(1, 2);
  if (cache != nullptr) {
    if (cache->keys_BJCA.defined()) {
      k = at::cat({cache->keys_BJCA, k}, 2);
      v = at::cat({cache->values_BJCA, v}, 2);
    }
    cache->keys_BJCA = k;
    cache->values_BJCA = v;
  }
  const at::Tensor mixed = mix(q, k, v, context);
  const at::Tensor joined =
      mixed.transpose(1, 2).reshape({x_BSD.size(0), x_BSD.size(1), config.num_heads * config.head_dim});
  return model::linear(joined, weights.o);
}

}  // namespace collegium::model
