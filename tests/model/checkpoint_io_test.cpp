// SPDX-License-Identifier: Apache-2.0
// Model folders written in shards by several ranks, and read in parts.
#include "collegium/model/checkpoint_io.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>

#include "collegium/base/error.h"
#include "collegium/model/tensor_io.h"

namespace collegium::model {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kExperts = 5;

ModelConfig tiny_config() {
  ModelConfig c;
  c.family = Family::kQwen3Moe;
  c.vocab_size = 29;
  c.hidden_size = 12;
  c.num_layers = 2;
  c.num_heads = 2;
  c.num_kv_heads = 1;
  c.head_dim = 6;
  c.dense_ffn_size = 10;
  c.max_positions = 32;
  c.qk_norm = QkNorm::kPerHead;
  c.moe_layers = {true, false};
  c.moe.num_experts = kExperts;
  c.moe.top_k = 2;
  c.moe.ffn_size = 8;
  return c;
}

std::vector<Parameter> initialized(const ExpertRange& held = {}) {
  auto parameters = list_parameters(tiny_config(), held);
  initialize_parameters(tiny_config(), 5, at::kFloat, parameters);
  return parameters;
}

at::Tensor value_of(const Parameter& parameter) { return parameter.value; }

class ModelFolder : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() /
              fmt::format("collegium_{}", testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  // What a rank with these experts loads equals what they are initialised to.
  void expect_loads(const ExpertRange& held) const {
    const auto loaded = load_parameters(folder_, tiny_config(), at::kFloat, held);
    const auto wanted = initialized(held);
    ASSERT_EQ(loaded.size(), wanted.size());
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      EXPECT_EQ(loaded[i].name, wanted[i].name);
      EXPECT_TRUE(at::equal(loaded[i].value, wanted[i].value)) << wanted[i].name;
    }
  }
  template <typename E>
  std::string refusal(const ExpertRange& held) const {
    try {
      load_parameters(folder_, tiny_config(), at::kFloat, held);
    } catch (const E& error) {
      return error.what();
    }
    return "no error";
  }
  // Rewrites model.safetensors.
  void edit(const std::function<void(std::vector<std::pair<std::string, at::Tensor>>&)>& change) const {
    const SafetensorsFile file(folder_ / "model.safetensors");
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    for (const auto& [name, info] : file.tensors()) tensors.emplace_back(name, read_tensor(file, name));
    change(tensors);
    write_tensors(folder_ / "model.safetensors", tensors);
  }

  fs::path folder_;
};

// Three ranks with 2, 2 and 1 experts; the first also writes the rest, cut into shards of at most 2000 bytes
// (which the embedding and the attention's larger matrices fill alone).
TEST_F(ModelFolder, shards_of_several_ranks_are_one_model) {
  const ModelConfig config = tiny_config();
  std::vector<ShardWriter> writers;
  std::int64_t total = 0;
  for (const ExpertRange held : {ExpertRange{0, 2}, ExpertRange{2, 2}, ExpertRange{4, 1}}) {
    writers.emplace_back(config, initialized(held), value_of,
                         ModelShare{.experts = true, .others = held.first == 0}, 2000);
    total += writers.back().num_shards();
  }
  EXPECT_GT(writers[1].num_shards(), 1);
  fs::create_directories(folder_);
  WeightIndex index;
  std::int64_t next = 1;
  for (const ShardWriter& writer : writers) {
    index.add(writer.write(folder_, next, total));
    next += writer.num_shards();
  }
  EXPECT_EQ(write_model_description(folder_, config, at::kFloat, index),
            (std::vector<std::string>{"config.json", "model.safetensors.index.json"}));
  EXPECT_TRUE(fs::exists(folder_ / fmt::format("model-{0:05}-of-{0:05}.safetensors", total)));
  const Json json = Json::parse(read_file(folder_ / "model.safetensors.index.json"));
  EXPECT_EQ(json["metadata"]["total_size"].get<std::int64_t>(), index.total_bytes);
  EXPECT_EQ(json["weight_map"].size(), list_disk_tensors(config, list_parameters(config)).size());
  expect_loads({});
  expect_loads({.first = 1, .count = 3});
  EXPECT_THROW(index.add(index), InternalError);
}

TEST_F(ModelFolder, rank_without_a_share_writes_nothing) {
  const ShardWriter writer(tiny_config(), initialized(), value_of, {.experts = false, .others = false});
  EXPECT_EQ(writer.num_shards(), 0);
  EXPECT_TRUE(writer.write(folder_, 1, 0).file_of.empty());
}

TEST_F(ModelFolder, one_shard_has_the_plain_name) {
  save_model(folder_, tiny_config(), initialized(), value_of);
  EXPECT_TRUE(fs::exists(folder_ / "model.safetensors"));
  EXPECT_FALSE(fs::exists(folder_ / "model.safetensors.index.json"));
  expect_loads({});
  expect_loads({.first = 0, .count = 1});
  expect_loads({.first = 3, .count = -1});
}

TEST_F(ModelFolder, single_file_beside_an_index_is_refused) {
  save_model(folder_, tiny_config(), initialized(), value_of);
  const auto write_index = [&](const char* shard) {
    const Json index = {{"weight_map", {{"lm_head.weight", shard}}}};
    write_file_atomically(folder_ / "model.safetensors.index.json", index.dump());
  };
  write_index("model-00001-of-00001.safetensors");
  EXPECT_THAT(
      refusal<ConfigError>({}),
      testing::HasSubstr("holds both model.safetensors and model.safetensors.index.json, which does"));
  write_index("model.safetensors");
  expect_loads({});
}

TEST_F(ModelFolder, experts_of_other_ranks_are_not_read) {
  save_model(folder_, tiny_config(), initialized(), value_of);
  edit([](auto& tensors) {
    for (auto& [name, tensor] : tensors) {
      if (name == "model.layers.0.mlp.experts.3.down_proj.weight") tensor.fill_(std::nan(""));
    }
  });
  expect_loads({.first = 0, .count = 3});
  expect_loads({.first = 4, .count = 1});
  EXPECT_THAT(refusal<ConfigError>({.first = 2, .count = 2}),
              testing::HasSubstr("experts.3.down_proj.weight': not finite at [0, 0]"));
}

TEST_F(ModelFolder, unknown_tensors_are_extra_on_every_rank) {
  save_model(folder_, tiny_config(), initialized(), value_of);
  edit([](auto& tensors) {
    tensors.emplace_back("model.layers.0.mlp.experts.5.up_proj.weight", at::zeros({8, 12}));
  });
  EXPECT_THAT(refusal<ConfigError>({.first = 0, .count = 2}),
              testing::HasSubstr("'model.layers.0.mlp.experts.5.up_proj.weight' is not part of the model"));
}

TEST_F(ModelFolder, fused_experts_are_narrowed) {
  save_model(folder_, tiny_config(), initialized(), value_of);
  const auto all = initialized();
  const auto find = [&](const std::string& name) {
    return std::find_if(all.begin(), all.end(), [&](const auto& p) { return p.name == name; })->value.clone();
  };
  edit([&](auto& tensors) {
    std::erase_if(tensors, [](const auto& t) { return t.first.find(".experts.") != std::string::npos; });
    tensors.emplace_back("model.layers.0.mlp.experts.gate_up_proj", find("layers.0.moe.gate_up"));
    tensors.emplace_back("model.layers.0.mlp.experts.down_proj", find("layers.0.moe.down"));
  });
  expect_loads({});
  expect_loads({.first = 2, .count = 2});
  edit([](auto& tensors) {
    for (auto& [name, tensor] : tensors) {
      if (name.ends_with("experts.down_proj")) tensor[3][1].fill_(std::nan(""));
    }
  });
  expect_loads({.first = 0, .count = 3});
  EXPECT_THAT(refusal<ConfigError>({.first = 2, .count = 2}),
              testing::HasSubstr("experts.down_proj': not finite at [3, 1, 0]"));
}

}  // namespace
}  // namespace collegium::model
