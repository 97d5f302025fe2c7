// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/parameters.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <functional>
#include <numeric>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/model/families/family.h"

namespace collegium::model {

namespace {

using Shape = std::vector<std::int64_t>;

class Lister {
 public:
  void add(std::string name, ParameterKind kind, Shape shape) {
    const bool trainable = kind != ParameterKind::kBuffer;
    list.push_back({.name = std::move(name),
                    .kind = kind,
                    .shape = std::move(shape),
                    .first_expert = kind == ParameterKind::kExpert ? held.first : 0,
                    .value = {},
                    .trainable = trainable});
  }
  ExpertRange held;
  std::vector<Parameter> list;
};

void list_moe(const ModelConfig& c, const std::string& prefix, Lister& out) {
  const moe::MoeOptions& o = c.moe;
  const std::int64_t d = c.hidden_size;
  const std::int64_t num_held = out.held.end(o.num_experts) - out.held.first;
  out.add(prefix + "router", ParameterKind::kRouter, {o.num_experts, d});
  if (o.router.noise == moe::Noise::kNoisyTopK)
    out.add(prefix + "noise", ParameterKind::kRouter, {o.num_experts, d});
  if (o.router.bias_balancing) out.add(prefix + "expert_bias", ParameterKind::kBuffer, {o.num_experts});
  out.add(prefix + "gate_up", ParameterKind::kExpert, {num_held, 2 * o.ffn_size, d});
  out.add(prefix + "down", ParameterKind::kExpert, {num_held, d, o.ffn_size});
  if (o.shared_expert.kind == moe::SharedExpert::kNone) return;
  out.add(prefix + "shared_gate_up", ParameterKind::kDense, {2 * o.shared_expert.ffn_size, d});
  out.add(prefix + "shared_down", ParameterKind::kDense, {d, o.shared_expert.ffn_size});
  if (o.shared_expert.kind == moe::SharedExpert::kGated)
    out.add(prefix + "shared_gate", ParameterKind::kDense, {1, d});
  if (o.shared_expert.kind == moe::SharedExpert::kResidualMix)
    out.add(prefix + "shared_mix", ParameterKind::kDense, {2, d});
}

void list_layer(const ModelConfig& c, std::int64_t layer, Lister& out) {
  const std::string prefix = fmt::format("layers.{}.", layer);
  const std::int64_t d = c.hidden_size;
  const std::int64_t q = c.num_heads * c.head_dim;
  const std::int64_t kv = c.num_kv_heads * c.head_dim;
  out.add(prefix + "input_norm", ParameterKind::kNorm, {d});
  out.add(prefix + "attention.q", ParameterKind::kDense, {q, d});
  out.add(prefix + "attention.k", ParameterKind::kDense, {kv, d});
  out.add(prefix + "attention.v", ParameterKind::kDense, {kv, d});
  out.add(prefix + "attention.o", ParameterKind::kDense, {d, q});
  if (c.qk_norm != QkNorm::kNone) {
    const bool per_head = c.qk_norm == QkNorm::kPerHead;
    out.add(prefix + "attention.q_norm", ParameterKind::kNorm, {per_head ? c.head_dim : q});
    out.add(prefix + "attention.k_norm", ParameterKind::kNorm, {per_head ? c.head_dim : kv});
  }
  out.add(prefix + "post_norm", ParameterKind::kNorm, {d});
  if (c.moe_layers[static_cast<std::size_t>(layer)]) {
    list_moe(c, prefix + "moe.", out);
  } else {
    out.add(prefix + "ffn.gate_up", ParameterKind::kDense, {2 * c.dense_ffn_size, d});
    out.add(prefix + "ffn.down", ParameterKind::kDense, {d, c.dense_ffn_size});
  }
}

// A matrix of `rows` x `columns`, or one expert of a stack, filled from its own stream.
void fill_normal(double deviation, const RandomStream& stream, const at::Tensor& values) {
  constexpr std::int64_t kValuesPerTask = 4096;
  auto* out = values.mutable_data_ptr<double>();
  at::parallel_for(0, values.numel(), kValuesPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      out[i] = deviation * stream.normal(static_cast<std::uint64_t>(i));
  });
}

at::Tensor initial_value(const ModelConfig& c, std::uint64_t seed, const Parameter& p) {
  if (p.kind == ParameterKind::kNorm) return at::ones(p.shape, at::kDouble);
  // Shazeer's gate starts at zero, so that all experts begin with equal load.
  const bool noisy_gate = p.kind == ParameterKind::kRouter && c.moe.router.noise == moe::Noise::kNoisyTopK;
  if (p.kind == ParameterKind::kBuffer || noisy_gate) return at::zeros(p.shape, at::kDouble);
  at::Tensor value = at::empty(p.shape, at::kDouble);
  if (p.kind != ParameterKind::kExpert) {
    fill_normal(c.initializer_range, RandomStream(seed, p.name), value);
    return value;
  }
  for (std::int64_t expert = 0; expert < p.shape[0]; ++expert) {
    const auto global = static_cast<std::uint64_t>(p.first_expert + expert);
    fill_normal(c.initializer_range, RandomStream(seed, p.name, global + 1), value.select(0, expert));
  }
  return value;
}

}  // namespace

std::int64_t num_values(const Parameter& parameter) {
  constexpr double kMost = 1e12;
  const double count =
      std::accumulate(parameter.shape.begin(), parameter.shape.end(), 1.0, std::multiplies<>());
  require_config(count <= kMost, "{} would have {:.3g} values: no machine could hold this model",
                 parameter.name, count);
  return static_cast<std::int64_t>(count);
}

std::vector<Parameter> list_parameters(const ModelConfig& config, const ExpertRange& held) {
  Lister out{.held = held, .list = {}};
  out.add("embed_tokens", ParameterKind::kEmbedding, {config.vocab_size, config.hidden_size});
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) list_layer(config, layer, out);
  out.add("norm", ParameterKind::kNorm, {config.hidden_size});
  if (!config.tie_embeddings)
    out.add("lm_head", ParameterKind::kEmbedding, {config.vocab_size, config.hidden_size});
  return out.list;
}

void initialize_parameters(const ModelConfig& config, std::uint64_t seed, at::ScalarType dtype,
                           std::vector<Parameter>& parameters) {
  const auto buffer_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  for (Parameter& parameter : parameters) {
    at::Tensor value = initial_value(config, seed, parameter);
    if (dtype != at::kDouble) value = value.to(at::kFloat);
    parameter.value = value.to(parameter.kind == ParameterKind::kBuffer ? buffer_dtype : dtype);
  }
}

}  // namespace collegium::model
