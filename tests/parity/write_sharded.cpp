// SPDX-License-Identifier: Apache-2.0

// write_sharded FOLDER: FOLDER/mixtral, FOLDER/olmoe and FOLDER/qwen3_moe, random models in shards of a few
// kilobytes, for sharded_test.py.

#include <ATen/core/Tensor.h>

#include "collegium/model/checkpoint_io.h"

namespace {

using namespace collegium;

model::ModelConfig config_of(model::Family family) {
  model::ModelConfig config;
  config.family = family;
  config.vocab_size = 37;
  config.hidden_size = 24;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 6;
  config.dense_ffn_size = 14;
  config.initializer_range = 0.3;
  config.moe.num_experts = 5;
  config.moe.top_k = 2;
  config.moe.ffn_size = 10;
  if (family == model::Family::kOlmoe) config.qk_norm = model::QkNorm::kProjection;
  if (family == model::Family::kQwen3Moe) {
    config.qk_norm = model::QkNorm::kPerHead;
    config.moe_layers = {false, true};
  }
  model::complete(config);
  model::validate(config, /*training=*/false);
  return config;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  constexpr std::int64_t kShardBytes = 12000;
  const std::filesystem::path folder = argv[1];
  for (const auto& [name, family] :
       {std::pair{"mixtral", model::Family::kMixtral}, std::pair{"olmoe", model::Family::kOlmoe},
        std::pair{"qwen3_moe", model::Family::kQwen3Moe}}) {
    const model::ModelConfig config = config_of(family);
    std::vector<model::Parameter> parameters = model::list_parameters(config);
    model::initialize_parameters(config, 5, at::kDouble, parameters);
    std::filesystem::create_directories(folder / name);
    model::save_model(
        folder / name, config, parameters, [](const model::Parameter& p) { return p.value; }, kShardBytes);
  }
  return 0;
}
