// SPDX-License-Identifier: Apache-2.0
// What config.json may say, key by key, and the tokens that end a text.
#include "collegium/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "collegium/base/error.h"
#include "collegium/base/file.h"

namespace collegium::model {
namespace {

namespace fs = std::filesystem;

// The keys `changes` (JSON) over those of a small model.
Json with(const std::string& family, const std::string& changes) {
  Json json = {{"model_type", family},         {"vocab_size", 29},         {"hidden_size", 16},
               {"num_hidden_layers", 2},       {"num_attention_heads", 4}, {"num_key_value_heads", 2},
               {"intermediate_size", 8},       {"num_experts", 4},         {"num_experts_per_tok", 2},
               {"max_position_embeddings", 32}};
  json.update(Json::parse(changes));
  return json;
}

std::string message(const Json& json) {
  try {
    validate(parse_model_config(json, "config.json"), /*training=*/false);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

TEST(ModelConfig, collegium_key_may_not_contradict_the_family) {
  const auto refusal = [](const std::string& family, const std::string& own, const std::string& collegium) {
    return message(with(family, "{" + own + (own.empty() ? "" : ",") + "\"collegium\": " + collegium + "}"));
  };
  // What only training needs.
  const std::string training = R"({"balance": {"z_loss": 0.1}, "router": {"noise": "gumbel"},
                                   "capacity": {"drop_policy": "position", "factor": 1.5}})";
  for (const char* family : {"mixtral", "olmoe"}) EXPECT_EQ(refusal(family, "", training), "accepted");
  EXPECT_EQ(refusal("mixtral", "", R"({"router": {"renormalize": "after_drop"},
                                      "capacity": {"drop_policy": "position"}})"),
            "accepted");
  EXPECT_EQ(refusal("mixtral", R"("router_jitter_noise": 0.1)", R"({"balance": {"z_loss": 0.1}})"),
            "accepted");
  // What the family's keys say otherwise.
  EXPECT_EQ(refusal("mixtral", "", R"({"num_experts": 8})"),
            "config.json: collegium.num_experts = 8: the family's own keys say 4");
  EXPECT_EQ(
      refusal("olmoe", R"("norm_topk_prob": true)", R"({"router": {"renormalize": "never"}})"),
      "config.json: collegium.router.renormalize = \"never\": the family's own keys say \"before_drop\"");
  EXPECT_EQ(refusal("mixtral", R"("router_jitter_noise": 0.1)", R"({"router": {"noise": "none"}})"),
            "config.json: collegium.router.noise = \"none\": the family's own keys say \"jitter_input\"");
  // What no model of the family may be.
  const std::pair<const char*, const char*> foreign[] = {
      {R"({"router": {"score": "sigmoid"}})", "router.score is not softmax"},
      {R"({"router": {"renormalize": "never"}})", "the weights are not renormalised"},
      {R"({"router": {"bias_balancing": true}})", "experts have a bias"},
      {R"({"shared_expert": {"kind": "sum", "ffn_size": 4}})", "there is a shared expert"},
      {R"({"capacity": {"drop_policy": "random", "drop_in_evaluation": true}})",
       "tokens are dropped in evaluation"}};
  for (const auto& [keys, reason] : foreign) {
    EXPECT_EQ(refusal("mixtral", "", keys),
              std::string("config.json: collegium: the model is not of family mixtral: ") + reason);
  }
}

TEST(ModelConfig, what_is_written_beside_a_family_is_read_again) {
  ModelConfig config = parse_model_config(with("mixtral", R"({"router_jitter_noise": 0.1})"), "config.json");
  config.moe.router.renormalize = moe::Renormalize::kAfterDrop;
  config.moe.capacity = {.drop_policy = moe::DropPolicy::kRandom, .factor = "1.5"};
  config.moe.balance.load_balance = 0.01;
  const Json json = write_model_config(config, "float32");
  EXPECT_EQ(json["model_type"], "mixtral");
  EXPECT_EQ(write_fields(parse_model_config(json, "config.json").moe), write_fields(config.moe));
}

TEST(ModelConfig, null_means_a_key_value_head_for_every_query_head) {
  for (const char* family : {"mixtral", "olmoe"}) {
    const ModelConfig config =
        parse_model_config(with(family, R"({"num_key_value_heads": null})"), "config.json");
    EXPECT_EQ(config.num_kv_heads, 4) << family;
  }
  EXPECT_EQ(message(with("qwen3_moe", R"({"num_key_value_heads": null})")),
            "config.json: num_key_value_heads = null: must be a whole number");
}

TEST(ModelConfig, base_of_the_rotary_embedding_is_the_same_wherever_it_stands) {
  const auto theta = [](const std::string& keys) {
    return parse_model_config(with("mixtral", keys), "config.json").rope_theta;
  };
  EXPECT_EQ(theta("{}"), 1e6);
  EXPECT_EQ(theta(R"({"rope_theta": 50})"), 50);
  EXPECT_EQ(theta(R"({"rope_parameters": {"rope_type": "default", "rope_theta": 60}})"), 60);
  EXPECT_EQ(theta(R"({"rope_theta": 60, "rope_scaling": null, "rope_parameters": {"rope_theta": 60}})"), 60);
  EXPECT_EQ(theta(R"({"rope_theta": 50, "rope_parameters": {"rope_theta": 60}})"), 60)
      << "as transformers reads it";
  EXPECT_EQ(
      theta(
          R"({"rope_theta": 50, "rope_parameters": {"rope_theta": 60}, "rope_scaling": {"type": "default"}})"),
      50)
      << "as transformers reads it";
  EXPECT_EQ(theta(R"({"rope_theta": 50, "rope_parameters": {"rope_theta": 60}, "rope_scaling": {}})"), 60);
  EXPECT_EQ(message(with("mixtral", R"({"rope_scaling": 2})")),
            "config.json: rope_scaling = 2: must be an object, or null");
}

TEST(ModelConfig, what_would_be_read_wrongly_is_refused) {
  EXPECT_EQ(message(with("mixtral", R"({"hidden_act": "swish"})")), "accepted");
  EXPECT_EQ(message(with("mixtral", R"({"hidden_act": "gelu"})")),
            "config.json: hidden_act = \"gelu\": only \"silu\" can be represented");
  EXPECT_EQ(message(with("mixtral", R"({"quantization_config": null})")), "accepted");
  EXPECT_EQ(message(with("mixtral", R"({"quantization_config": {"quant_method": "fp8"}})")),
            "config.json: quantization_config: only weights that are not quantized can be represented");
  EXPECT_EQ(message(with("mixtral", R"({"num_local_experts": 4})")), "accepted");
  EXPECT_EQ(message(with("mixtral", R"({"num_local_experts": 8})")),
            "config.json: num_experts = 4: differs from num_local_experts = 8");
  const ModelConfig plain = parse_model_config(with("olmoe", "{}"), "config.json");
  const std::int64_t wrong = plain.hidden_size / plain.num_heads + 1;
  EXPECT_EQ(message(with("olmoe", fmt::format(R"({{"head_dim": {}}})", wrong))),
            fmt::format("config.json: head_dim = {}: must be hidden_size / num_attention_heads = {} / {}",
                        wrong, plain.hidden_size, plain.num_heads));
}

TEST(ModelConfig, clipping_needs_a_positive_bound) {
  EXPECT_EQ(message(with("olmoe", R"({"clip_qkv": null})")), "accepted");
  EXPECT_EQ(message(with("olmoe", R"({"clip_qkv": 0.5})")), "accepted");
  for (const char* bound : {"-1", "0"}) {
    EXPECT_EQ(message(with("olmoe", fmt::format(R"({{"clip_qkv": {}}})", bound))),
              fmt::format("config.json: clip_qkv = {}: must be positive, or null for none", bound));
  }
  ModelConfig config = parse_model_config(with("olmoe", "{}"), "config.json");
  config.clip_qkv = -1;
  EXPECT_THROW(validate(config, /*training=*/false), ConfigError);
}

TEST(EosIds, come_from_generation_config_before_config) {
  const fs::path folder = fs::temp_directory_path() / fmt::format("collegium_eos_ids_test-{}", ::getpid());
  fs::create_directories(folder);
  fs::remove(folder / "generation_config.json");
  const auto eos_ids = [&](const std::string& keys) {
    return read_eos_ids(folder, parse_model_config(with("mixtral", keys), "config.json"));
  };
  EXPECT_THAT(eos_ids("{}"), testing::ElementsAre(2)) << "the class default";
  EXPECT_THAT(eos_ids(R"({"eos_token_id": null})"), testing::IsEmpty());
  EXPECT_THAT(eos_ids(R"({"eos_token_id": 2})"), testing::ElementsAre(2));
  EXPECT_THAT(eos_ids(R"({"eos_token_id": [2, 7]})"), testing::ElementsAre(2, 7));
  EXPECT_THROW(eos_ids(R"({"eos_token_id": "end"})"), ConfigError);
  write_file_atomically(folder / "generation_config.json", R"({"eos_token_id": 5})");
  EXPECT_THAT(eos_ids(R"({"eos_token_id": [2, 7]})"), testing::ElementsAre(5));
  write_file_atomically(folder / "generation_config.json", "{}");
  EXPECT_THAT(eos_ids(R"({"eos_token_id": 2})"), testing::ElementsAre(2));
  fs::remove_all(folder);
}

}  // namespace
}  // namespace collegium::model
