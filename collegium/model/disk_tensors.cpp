// SPDX-License-Identifier: Apache-2.0

// From parameters in memory to the tensors of a family's checkpoint.

#include "collegium/base/error.h"
#include "collegium/model/families/family.h"
#include "collegium/model/parameters.h"

namespace collegium::model {

namespace {

std::string replace_percent(const std::string& pattern, std::int64_t expert) {
  const std::size_t position = pattern.find('%');
  return pattern.substr(0, position) + std::to_string(expert) + pattern.substr(position + 1);
}

// Names inside a layer that need no slicing; the same in every family.
std::string simple_name(const std::string& local, const TensorNames& names) {
  static const std::map<std::string, std::string> kNames = {
      {"input_norm", "input_layernorm.weight"},
      {"post_norm", "post_attention_layernorm.weight"},
      {"attention.q", "self_attn.q_proj.weight"},
      {"attention.k", "self_attn.k_proj.weight"},
      {"attention.v", "self_attn.v_proj.weight"},
      {"attention.o", "self_attn.o_proj.weight"},
      {"attention.q_norm", "self_attn.q_norm.weight"},
      {"attention.k_norm", "self_attn.k_norm.weight"},
      {"ffn.down", "mlp.down_proj.weight"},
      {"moe.noise", "mlp.gate_noise.weight"},
      {"moe.expert_bias", "mlp.gate.e_score_correction_bias"},
      {"moe.shared_down", "mlp.shared_expert.down_proj.weight"},
      {"moe.shared_gate", "mlp.shared_expert_gate.weight"},
      {"moe.shared_mix", "mlp.shared_expert_mix.weight"}};
  if (local == "moe.router") return names.router;
  const auto found = kNames.find(local);
  COLLEGIUM_CHECK(found != kNames.end(), "no on-disk name for '{}'", local);
  return found->second;
}

void list_layer_tensors(const std::string& prefix, const std::string& local, const Parameter& p,
                        std::size_t index, const TensorNames& names, std::vector<DiskTensor>& out) {
  const auto halves = [&](const std::string& gate, const std::string& up, std::int64_t expert) {
    const std::int64_t rows = p.shape[p.shape.size() - 2] / 2;
    const std::vector<std::int64_t> shape = {rows, p.shape.back()};
    out.push_back({.name = prefix + gate,
                   .parameter = index,
                   .shape = shape,
                   .expert = expert,
                   .first_row = 0,
                   .num_rows = rows});
    out.push_back({.name = prefix + up,
                   .parameter = index,
                   .shape = shape,
                   .expert = expert,
                   .first_row = rows,
                   .num_rows = rows});
  };
  if (local == "moe.gate_up") {
    for (std::int64_t e = 0; e < p.shape[0]; ++e) {
      const std::int64_t id = p.first_expert + e;
      halves(replace_percent(names.expert_gate, id), replace_percent(names.expert_up, id), e);
    }
  } else if (local == "moe.down") {
    for (std::int64_t e = 0; e < p.shape[0]; ++e) {
      out.push_back({.name = prefix + replace_percent(names.expert_down, p.first_expert + e),
                     .parameter = index,
                     .shape = {p.shape[1], p.shape[2]},
                     .expert = e,
                     .first_row = 0,
                     .num_rows = -1});
    }
  } else if (local == "ffn.gate_up") {
    halves("mlp.gate_proj.weight", "mlp.up_proj.weight", -1);
  } else if (local == "moe.shared_gate_up") {
    halves("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight", -1);
  } else {
    out.push_back({.name = prefix + simple_name(local, names),
                   .parameter = index,
                   .shape = p.shape,
                   .expert = -1,
                   .first_row = 0,
                   .num_rows = -1});
  }
}

}  // namespace

TensorNames tensor_names(Family family) {
  if (family == Family::kMixtral) {
    return {.router = "block_sparse_moe.gate.weight",
            .expert_gate = "block_sparse_moe.experts.%.w1.weight",
            .expert_up = "block_sparse_moe.experts.%.w3.weight",
            .expert_down = "block_sparse_moe.experts.%.w2.weight"};
  }
  return {.router = "mlp.gate.weight",
          .expert_gate = "mlp.experts.%.gate_proj.weight",
          .expert_up = "mlp.experts.%.up_proj.weight",
          .expert_down = "mlp.experts.%.down_proj.weight"};
}

std::vector<DiskTensor> list_disk_tensors(const ModelConfig& config,
                                          const std::vector<Parameter>& parameters) {
  const TensorNames names = tensor_names(config.family);
  std::vector<DiskTensor> out;
  for (std::size_t index = 0; index < parameters.size(); ++index) {
    const Parameter& p = parameters[index];
    const std::size_t second_dot = p.name.starts_with("layers.") ? p.name.find('.', 7) : std::string::npos;
    if (second_dot != std::string::npos) {
      list_layer_tensors("model." + p.name.substr(0, second_dot + 1), p.name.substr(second_dot + 1), p, index,
                         names, out);
      continue;
    }
    const std::string name = p.name == "lm_head" ? "lm_head.weight" : "model." + p.name + ".weight";
    out.push_back(
        {.name = name, .parameter = index, .shape = p.shape, .expert = -1, .first_row = 0, .num_rows = -1});
  }
  return out;
}

at::Tensor disk_view(const DiskTensor& disk, const at::Tensor& source) {
  at::Tensor view = disk.expert >= 0 ? source.select(0, disk.expert) : source;
  return disk.num_rows >= 0 ? view.narrow(0, disk.first_row, disk.num_rows) : view;
}

}  // namespace collegium::model
