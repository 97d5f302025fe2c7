// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace collegium::model {

/// What     Rows of the embedding by token id, with autograd.
/// Shape    weight_VD [V, D], ids_BS int64 -> [B, S, D].
/// Dtype    the gradient of a row is summed over its tokens in fp32 (fp64 for fp64) and rounded once:
///          frequent tokens would lose most of theirs in bf16. Other devices than the CPU sum as their ATen
///          does.
/// Order    On the CPU deterministic: a row's tokens are added in order. The row `padding_id` (-1 = none)
///          gets no gradient from here, as in transformers, where it is the config's pad_token_id.
at::Tensor embed(const at::Tensor& weight_VD, const at::Tensor& ids_BS, std::int64_t padding_id);

}  // namespace collegium::model
