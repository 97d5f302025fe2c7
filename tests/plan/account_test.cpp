// SPDX-License-Identifier: Apache-2.0
#include "collegium/plan/account.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"

namespace collegium::plan {
namespace {

using testing::HasSubstr;

struct Published {
  const char* name;
  std::int64_t total;
  std::int64_t active;
  std::int64_t active_without_embedding;
  std::int64_t attention_per_layer;
  std::int64_t expert;
};

// Totals of the models as transformers builds them.
constexpr Published kPublished[] = {
    {"mixtral-8x7b", 46'702'792'704, 12'879'925'248, 12'748'853'248, 41'943'040, 176'160'768},
    {"mixtral-8x22b", 140'620'634'112, 39'152'031'744, 38'955'423'744, 88'080'384, 301'989'888},
    {"mixtral-8x22b-instruct", 140'630'071'296, 39'161'468'928, 38'960'142'336, 88'080'384, 301'989'888},
    {"qwen3-30b-a3b", 30'532'122'624, 3'353'032'704, 3'041'867'776, 18'874'624, 4'718'592},
    {"qwen3-235b-a22b", 235'093'634'560, 22'190'763'520, 21'568'433'664, 71'303'424, 18'874'368},
    {"qwen1.5-moe-a2.7b", 14'315'784'192, 2'689'173'504, 2'378'008'576, 16'783'360, 8'650'752},
    {"qwen2-57b-a14b", 57'408'658'944, 14'249'270'784, 13'704'732'160, 29'364'736, 27'525'120},
    {"olmoe-1b-7b", 6'919'161'856, 1'282'017'280, 1'178'994'688, 16'781'312, 6'291'456},
    {"deepseek-v2-lite", 15'706'484'224, 2'661'150'208, 2'451'435'008, 13'763'072, 8'650'752},
    {"deepseek-v2", 235'741'434'880, 21'375'800'320, 20'851'512'320, 149'227'520, 23'592'960},
    {"deepseek-v3", 671'026'404'352, 37'552'282'624, 36'625'603'584, 187'107'328, 44'040'192},
    {"gpt-oss-120b", 116'829'156'672, 5'711'982'912, 5'132'849'472, 26'550'144, 24'891'840},
    {"gpt-oss-20b", 20'914'757'184, 4'187'440'704, 3'608'307'264, 26'550'144, 24'891'840},
};

TEST(Account, equals_the_published_models_to_the_parameter) {
  for (const Published& p : kPublished) {
    SCOPED_TRACE(p.name);
    const ModelSpec model = load_model(p.name);
    const Account counts = account(model);
    EXPECT_EQ(counts.total, p.total);
    EXPECT_EQ(counts.active, p.active);
    EXPECT_EQ(counts.active_without_embedding, p.active_without_embedding);
    const LayerWeights last = layer_weights(model, model.layers - 1);
    EXPECT_EQ(last.attention(), p.attention_per_layer);
    EXPECT_EQ(last.expert, p.expert);
  }
}

TEST(Account, dense_models_equal_their_published_totals) {
  EXPECT_EQ(account(load_model("llama3-8b")).total, 8'030'261'248);
  EXPECT_EQ(account(load_model("llama3-70b")).total, 70'553'706'496);
  EXPECT_EQ(account(load_model("llama3-405b")).total, 405'853'388'800);
  EXPECT_EQ(account(load_model("bloom-176b")).total, 176'247'271'424);
}

TEST(Account, deepseek_v3_keeps_bias_and_prediction_layer_apart) {
  const Account counts = account(load_model("deepseek-v3"));
  EXPECT_EQ(counts.selection_bias, 14'848);
  // The published 11,610,068,224 counts the prediction layer's own 256 selection biases.
  EXPECT_EQ(counts.mtp + 256, 11'610'068'224);
}

TEST(Account, worked_example_of_mixtral) {
  const ModelSpec model = load_model("mixtral-8x7b");
  const std::string text = format_account(model, account(model), 4096);
  for (const char* figure : {"131,072,000", "1,342,177,280", "1,048,576", "45,097,156,608", "11,274,289,152",
                             "46,702,792,704", "12,879,925,248", "12.9 B rounded, 12.8 B truncated"})
    EXPECT_THAT(text, HasSubstr(figure));
}

TEST(Account, forward_flops_of_a_token) {
  const std::pair<const char*, double> expected[] = {
      {"mixtral-8x7b", 2.657e10},    {"mixtral-8x22b", 8.073e10}, {"qwen3-30b-a3b", 7.694e9},
      {"qwen3-235b-a22b", 4.945e10}, {"olmoe-1b-7b", 2.626e9},    {"deepseek-v2-lite", 5.469e9},
      {"deepseek-v3", 8.349e10}};
  for (const auto& [name, flops] : expected) {
    const TokenFlops f = forward_flops_per_token(load_model(name), 4096);
    EXPECT_NEAR((f.total() - f.mtp) / flops, 1.0, 2e-3) << name;
  }
}

// As `train` writes it; 3 matrices of 16 x 8 an expert, of which 1.5 of 4 compute a token.
TEST(Account, a_config_of_collegium_moe_has_everything_below_one_key) {
  const Json moe = {{"num_experts", 4},
                    {"top_k", 2},
                    {"ffn_size", 8},
                    {"router", {{"selection", "expert_choice"}, {"expert_choice_factor", "1.5"}}},
                    {"shared_expert", {{"kind", "none"}, {"ffn_size", 0}}}};
  const Json sizes = {{"vocab_size", 300}, {"hidden_size", 16}, {"num_layers", 1}, {"num_heads", 2},
                      {"head_dim", 8},     {"num_kv_heads", 2}, {"moe", moe}};
  const ModelSpec model = parse_model({{"model_type", "collegium_moe"}, {"collegium", sizes}}, "config.json");
  EXPECT_EQ(model.experts_per_token(), 1.5);
  const Account counted = account(model);
  EXPECT_EQ(counted.total - counted.active, 3 * 16 * 8 * 5 / 2);
}

// The parameters of model::list_parameters() for the same options: 16 wide, 4 experts of width 8.
TEST(Account, a_config_of_collegium_moe_has_whatever_its_layers_have) {
  const auto total = [](const Json& router, const Json& shared) {
    const Json moe = {
        {"num_experts", 4}, {"top_k", 2}, {"ffn_size", 8}, {"router", router}, {"shared_expert", shared}};
    const Json sizes = {{"vocab_size", 300}, {"hidden_size", 16}, {"num_layers", 2},        {"num_heads", 2},
                        {"head_dim", 8},     {"num_kv_heads", 2}, {"tie_embeddings", true}, {"moe", moe}};
    return account(parse_model({{"model_type", "collegium_moe"}, {"collegium", sizes}}, "config.json"));
  };
  const std::int64_t layer = 4 * 16 * 16 + 2 * 16 + 4 * 16 + 4 * 3 * 16 * 8;
  const std::int64_t plain = 300 * 16 + 16 + 2 * layer;
  const Json none = {{"kind", "none"}, {"ffn_size", 24}};
  EXPECT_EQ(total(Json::object(), none).total, plain);
  EXPECT_EQ(total({{"noise", "noisy_top_k"}}, none).total, plain + 2 * 4 * 16);
  EXPECT_EQ(total({{"noise", "gumbel"}}, none).total, plain);
  const Account balanced = total({{"bias_balancing", true}}, none);
  EXPECT_EQ(balanced.total, plain);
  EXPECT_EQ(balanced.selection_bias, 2 * 4);
  const std::int64_t shared = 2 * 3 * 16 * 24;
  EXPECT_EQ(total({}, {{"kind", "sum"}, {"ffn_size", 24}}).total, plain + shared);
  EXPECT_EQ(total({}, {{"kind", "gated"}, {"ffn_size", 24}}).total, plain + shared + 2 * 16);
  EXPECT_EQ(total({}, {{"kind", "residual_mix"}, {"ffn_size", 24}}).total, plain + shared + 2 * 2 * 16);
}

TEST(Account, windowed_layers_see_fewer_keys) {
  EXPECT_DOUBLE_EQ(mean_visible_keys(4, 0), 2.5);
  EXPECT_DOUBLE_EQ(mean_visible_keys(4, 2), (1 + 2 + 2 + 2) / 4.0);
}

std::string message_of(const Json& config) {
  try {
    parse_model(config, "config.json");
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Model, errors_name_key_value_and_rule) {
  EXPECT_THAT(message_of({{"model_type", "mamba"}}), HasSubstr("model_type = \"mamba\": must be one of"));
  EXPECT_THAT(message_of({{"model_type", "mixtral"}, {"vocab_size", 10}}),
              HasSubstr("hidden_size is missing"));
  const Json bad = {{"model_type", "mixtral"},  {"vocab_size", 10},         {"hidden_size", 64},
                    {"num_hidden_layers", 2},   {"num_attention_heads", 4}, {"intermediate_size", 32},
                    {"num_experts_per_tok", 9}, {"num_local_experts", 8}};
  EXPECT_THAT(message_of(bad),
              HasSubstr("experts per token = 9: must be between 1 and the number of experts = 8"));
  EXPECT_THROW(load_model("mixtral-8x7c"), ConfigError);
}

TEST(Model, without_a_layer_of_experts_is_dense) {
  const Json qwen = {{"model_type", "qwen3_moe"}, {"vocab_size", 10},         {"hidden_size", 64},
                     {"num_hidden_layers", 2},    {"num_attention_heads", 4}, {"moe_intermediate_size", 32},
                     {"num_experts", 16},         {"intermediate_size", 128}, {"decoder_sparse_step", 3}};
  const ModelSpec model = parse_model(qwen, "config.json");
  EXPECT_FALSE(model.is_moe());
  const Account counted = account(model);
  EXPECT_EQ(counted.total, counted.active);
  EXPECT_THAT(format_account(model, counted, 16), HasSubstr("3 x 64 x 128"));
}

TEST(Model, sizes_that_cannot_be_counted_are_refused) {
  const Json model = {{"model_type", "mixtral"},  {"vocab_size", 10},         {"hidden_size", 64},
                      {"num_hidden_layers", 2},   {"num_attention_heads", 4}, {"intermediate_size", 32},
                      {"num_experts_per_tok", 2}, {"num_local_experts", 8}};
  const auto message = [&](const Json& sizes) {
    Json config = model;
    config.update(sizes);
    return message_of(config);
  };
  EXPECT_EQ(message({{"num_hidden_layers", 10000}}), "no error");
  EXPECT_EQ(message({{"num_experts", 8}}), "no error");
  EXPECT_EQ(message({{"num_experts", 16}}),
            "config.json: num_experts = 16: differs from num_local_experts = 8");
  EXPECT_THAT(message({{"num_hidden_layers", std::int64_t{1} << 30}}),
              HasSubstr("layers = 1073741824: must lie between 1 and 10000"));
  EXPECT_THAT(message({{"num_hidden_layers", 0}}), HasSubstr("layers = 0: must lie between 1 and 10000"));
  EXPECT_THAT(message({{"hidden_size", std::int64_t{1} << 31}}),
              HasSubstr("hidden_size = 2147483648: must be below 2^31"));
  EXPECT_THAT(message({{"hidden_size", std::uint64_t{1} << 63}}), HasSubstr("must be below 2^31"));
  EXPECT_THAT(message({{"hidden_size", 1 << 30}, {"intermediate_size", 1 << 30}}),
              HasSubstr("its sizes make 6.5e+19 parameters: must be below 1e+17"));
}

TEST(Model, layers_and_groups_that_cannot_be_are_refused) {
  const auto message = [](Json config, const char* key, const Json& value) {
    config[key] = value;
    return message_of(config);
  };
  Json qwen = {{"model_type", "qwen3_moe"}, {"vocab_size", 10},         {"hidden_size", 64},
               {"num_hidden_layers", 2},    {"num_attention_heads", 4}, {"moe_intermediate_size", 32},
               {"num_experts", 16},         {"intermediate_size", 128}};
  EXPECT_EQ(message(qwen, "mlp_only_layers", {1}), "no error");
  for (const Json& bad : {Json{99}, Json{"a"}, Json{-1}, Json{0.5}})
    EXPECT_THAT(message(qwen, "mlp_only_layers", bad),
                HasSubstr("mlp_only_layers has " + bad[0].dump() + ": must be layers from 0 to "));
  EXPECT_THAT(message(qwen, "mlp_only_layers", 1), HasSubstr("mlp_only_layers = 1: must be a list"));
  EXPECT_THAT(message(qwen, "decoder_sparse_step", 0),
              HasSubstr("decoder_sparse_step = 0: must be at least 1"));
  Json deepseek = qwen;
  deepseek.update({{"model_type", "deepseek_v3"},
                   {"kv_lora_rank", 8},
                   {"qk_nope_head_dim", 8},
                   {"qk_rope_head_dim", 8},
                   {"v_head_dim", 8},
                   {"n_routed_experts", 16},
                   {"num_experts_per_tok", 4},
                   {"n_group", 4}});
  EXPECT_EQ(message(deepseek, "topk_group", 2), "no error");
  EXPECT_THAT(message(deepseek, "moe_layer_freq", 0), HasSubstr("moe_layer_freq = 0: must be at least 1"));
  EXPECT_THAT(message(deepseek, "topk_group", 0), HasSubstr("topk_group = 0: must be at least 1"));
  EXPECT_THAT(message(deepseek, "topk_group", 5), HasSubstr("5: must be between 1 and the groups = 4"));
  deepseek["topk_group"] = 1;
  EXPECT_THAT(message(deepseek, "n_group", 3), HasSubstr("3: must divide the number of experts = 16"));
  deepseek["num_experts_per_tok"] = 5;
  EXPECT_THAT(message(deepseek, "topk_group", 1),
              HasSubstr("= 5: must be at most those of its 1 groups = 4"));
}

TEST(Model, a_config_of_collegium_moe_names_what_is_wrong) {
  const Json moe = {{"num_experts", 4}, {"top_k", 2}, {"ffn_size", 8}};
  const Json sizes = {{"vocab_size", 300}, {"hidden_size", 16}, {"num_layers", 2},
                      {"num_heads", 2},    {"moe_layers", {1}}, {"moe", moe}};
  EXPECT_THAT(message_of({{"model_type", "collegium_moe"}, {"collegium", sizes}}),
              HasSubstr("collegium: moe_layers has 1: must be true (experts) or false (dense)"));
  Json other = sizes;
  other["moe_layers"] = {true, true};
  other["moe"]["shared_expert"] = {{"kind", "summed"}};
  EXPECT_THAT(message_of({{"model_type", "collegium_moe"}, {"collegium", other}}),
              HasSubstr("kind = \"summed\": must be one of none, sum, gated, residual_mix"));
}

}  // namespace
}  // namespace collegium::plan
