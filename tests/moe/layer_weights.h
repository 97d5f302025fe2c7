// SPDX-License-Identifier: Apache-2.0
#pragma once

// Random weights of a layer, and the tensors that gradients are taken of, by name.

#include <string>
#include <vector>

#include "collegium/moe/layer.h"
#include "tests/support/tensors.h"

namespace collegium::test {

constexpr std::int64_t kWidth = 7;  // D

inline moe::MoeWeights make_weights(const moe::MoeOptions& o, at::ScalarType dtype = at::kDouble) {
  moe::MoeWeights w;
  const std::int64_t shared = o.shared_expert.ffn_size;
  w.router.gate_ED = random_tensor("gate", {o.num_experts, kWidth}, dtype);
  if (o.router.noise == moe::Noise::kNoisyTopK)
    w.router.noise_ED = random_tensor("noise", {o.num_experts, kWidth}, dtype);
  if (o.router.bias_balancing) w.router.expert_bias_E = 0.3 * random_tensor("bias", {o.num_experts});
  w.gate_up_LGD = random_tensor("gate_up", {o.num_experts, 2 * o.ffn_size, kWidth}, dtype);
  w.down_LDF = random_tensor("down", {o.num_experts, kWidth, o.ffn_size}, dtype);
  if (o.shared_expert.kind == moe::SharedExpert::kNone) return w;
  w.shared_gate_up_GD = random_tensor("shared_gate_up", {2 * shared, kWidth}, dtype);
  w.shared_down_DF = random_tensor("shared_down", {kWidth, shared}, dtype);
  if (o.shared_expert.kind == moe::SharedExpert::kGated)
    w.shared_gate_1D = random_tensor("shared_gate", {1, kWidth}, dtype);
  if (o.shared_expert.kind == moe::SharedExpert::kResidualMix)
    w.shared_mix_2D = random_tensor("shared_mix", {2, kWidth}, dtype);
  return w;
}

struct Differentiable {
  std::string name;
  at::Tensor* tensor;
};

inline std::vector<Differentiable> differentiable(moe::MoeWeights& w, at::Tensor& x) {
  std::vector<Differentiable> all = {{"x", &x},
                                     {"gate", &w.router.gate_ED},
                                     {"noise", &w.router.noise_ED},
                                     {"gate_up", &w.gate_up_LGD},
                                     {"down", &w.down_LDF},
                                     {"shared_gate_up", &w.shared_gate_up_GD},
                                     {"shared_down", &w.shared_down_DF},
                                     {"shared_gate", &w.shared_gate_1D},
                                     {"shared_mix", &w.shared_mix_2D}};
  std::erase_if(all, [](const Differentiable& d) { return !d.tensor->defined(); });
  return all;
}

}  // namespace collegium::test
