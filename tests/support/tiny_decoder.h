// SPDX-License-Identifier: Apache-2.0
#pragma once

// A decoder with dense and expert layers, small enough to run many times.

#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>

#include "collegium/model/decoder.h"

namespace collegium::test {

constexpr std::int64_t kTinyVocabulary = 29;

inline model::Decoder tiny_decoder(at::ScalarType dtype, std::int64_t window = 0,
                                   const at::Device& device = at::kCPU) {
  model::ModelConfig c;
  c.family = model::Family::kQwen3Moe;
  c.vocab_size = kTinyVocabulary;
  c.hidden_size = 12;
  c.num_layers = 3;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.head_dim = 6;
  c.dense_ffn_size = 10;
  c.max_positions = 32;
  c.initializer_range = 0.3;
  c.sliding_window = window;
  c.qk_norm = model::QkNorm::kPerHead;
  c.moe_layers = {true, false, true};
  c.moe.num_experts = 4;
  c.moe.top_k = 2;
  c.moe.ffn_size = 8;
  auto parameters = model::list_parameters(c);
  model::initialize_parameters(c, 5, dtype, parameters);
  for (model::Parameter& parameter : parameters) parameter.value = parameter.value.to(device);
  return {c, std::move(parameters)};
}

/// Two sequences of eleven tokens.
inline at::Tensor tiny_ids() {
  return at::arange(22, at::kLong).mul(7).remainder(kTinyVocabulary).view({2, 11});
}

}  // namespace collegium::test
