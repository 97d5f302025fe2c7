// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::model {

/// Queries whose scores exist at one time: over 512 keys a quarter of a core's second cache. A block computes
/// the scores of all keys that its last query sees.
inline constexpr std::int64_t kAttentionQueries = 128;

/// What     softmax(q k^T / sqrt(A)) v, where query i sees keys 0..i; with its gradient. A head's scores
///          exist some rows at a time and are computed again in the backward pass [Dao2022, Alg 1 and 4];
///          all products and sums in fp32 (fp64 for fp64), results rounded once.
/// Shape    q_BHSA [B, H, S, A], k and v [B, J, S, A] with J a divisor of H; any strides with the last
///          one 1 -> [B, H, S, A], a view of [B, S, H, A].
/// Order    no result depends on the number of threads.
at::Tensor causal_attention(const at::Tensor& q_BHSA, const at::Tensor& k_BJSA, const at::Tensor& v_BJSA);

}  // namespace collegium::model
