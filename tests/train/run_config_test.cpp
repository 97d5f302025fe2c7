// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/run_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/train/freeze.h"
#include "tests/support/tiny_run_file.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;

class RunConfig : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / "collegium_run_config_test";
    fs::create_directories(folder_);
    write_file_atomically(folder_ / "run.toml", test::tiny_run_file(folder_));
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string message(const std::string& override_text) const {
    try {
      train::read_run_config(folder_ / "run.toml", {override_text});
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "accepted";
  }
  fs::path folder_;
};

TEST_F(RunConfig, every_mistake_has_its_message) {
  const std::pair<const char*, const char*> mistakes[] = {
      {"train.stepz=3", "unknown key 'train.stepz'; did you mean 'steps'?"},
      {"trian.steps=3", "unknown key 'trian'; did you mean 'train'?"},
      {"train.steps=\"three\"", "train.steps = \"three\": expected a whole number"},
      {"train.steps=1.5", "train.steps = 1.5: expected a whole number"},
      {"train.steps=0", "train.steps = 0: must be at least 1"},
      {"train.dtype=float16", "train.dtype = \"float16\": must be float64, float32 or bfloat16"},
      {"train.seed=-1", "train.seed = -1: expected a whole number from 0 to 18446744073709551615"},
      {"train.threads=-2", "train.threads = -2: must not be negative (0 = a share of the cores)"},
      {"run_folder=\"\"", "run_folder: name the folder of the run"},
      {"data.path=\"\"", "data.path: name a folder made by 'collegium prepare'"},
      {"data.sequence_length=1", "data.sequence_length = 1: must be at least 2"},
      {"data.sequence_length=65", "data.sequence_length = 65: more than model.max_positions = 64"},
      {"batch.global_batch=0", "batch.global_batch = 0: must be at least 1"},
      {"batch.micro_sequences=7", "batch.micro_sequences = 7: must lie between 1 and batch.global_batch = 6"},
      {"model.moe.capacity.group_sequences=2",
       "model.moe.capacity.group_sequences = 2: must divide batch.micro_sequences = 3 and batch.global_batch "
       "= 6"},
      {"model.moe.capacity.group_sequences=0", "model.moe.capacity.group_sequences = 0: must be at least 1"},
      {"parallel.bucket_mib=1e30", "parallel.bucket_mib = 1e+30: must be positive, and at most 1048576"},
      {"parallel.overlap.chunks=257", "parallel.overlap.chunks = 257: must lie between 1 and 256"},
      {"planner.cluster=nowhere", "planner.cluster = nowhere: neither a cluster of the catalogue nor a file"},
      {"model.moe.router.noise=jiter",
       "model.moe.router.noise = \"jiter\": must be one of none, jitter_router, jitter_input"},
      {"model.family=llama",
       "model.family = \"llama\": must be one of mixtral, olmoe, qwen3_moe, collegium_moe"},
      {"model.hidden=3", "unknown key 'model.hidden'; did you mean"},
      {"model.config=nowhere", "cannot read nowhere"},
      {"optimizer.learning_rate=0", "optimizer.learning_rate = 0: must be positive"},
      {"optimizer.beta2=1", "optimizer.beta2 = 1: must lie in [0, 1)"},
      {"optimizer.epsilon=1e-46", "optimizer.epsilon = 1e-46: must be at least 1.18e-38"},
      {"optimizer.weight_decay=inf", "optimizer.weight_decay = inf: must be finite"},
      {"model.norm_eps=nan", "model.norm_eps = nan: must be finite"},
      {"train.threads=100000", "train.threads = 100000: must be at most "},
      {"batch.global_batch=10000000000000",
       "batch.global_batch = 10000000000000: with data.sequence_length = 12 a step would have more than"},
      {"model.hidden_size=33",
       "model.hidden_size = 33: must be a multiple of num_heads = 2 where head_dim is not given"},
      {"model.num_layers=1000000000000", "model.num_layers = 1000000000000: must be at most 10000"},
      {"model.moe.capacity.factor=true",
       "model.moe.capacity.factor = true: expected a finite decimal number"},
      {"optimizer.clip_norm=-1", "optimizer.clip_norm = -1: must not be negative"},
      {"schedule.kind=linear", "schedule.kind = \"linear\": must be one of constant, cosine, wsd"},
      {"schedule.warmup_steps=7", "schedule.warmup_steps = 7: must lie between 0 and train.steps = 6"},
      {"schedule.final_ratio=2", "schedule.final_ratio = 2: must lie in [0, 1]"},
      {"checkpoint.keep_last=-1", "checkpoint.keep_last = -1: must not be negative"},
      {"validation.sequences=0", "validation.sequences = 0: must be at least 1"},
      {"steps", "--set steps: must be KEY=VALUE"},
      {"run_folder.x=1", "--set run_folder.x=1: 'run_folder' is not a table"}};
  for (const auto& [text, expected] : mistakes)
    EXPECT_THAT(message(text), testing::StartsWith(expected)) << text;
}

TEST_F(RunConfig, toml_syntax_errors_name_file_line_and_column) {
  write_file_atomically(folder_ / "bad.toml", "run_folder = \"x\"\n[data\npath = 1\n");
  try {
    train::read_run_config(folder_ / "bad.toml", {});
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("bad.toml:2:"));
  }
}

TEST_F(RunConfig, capacity_keys_that_would_do_nothing_are_refused) {
  const std::pair<const char*, const char*> mistakes[] = {
      {"model.moe.capacity.drop_policy=none", "accepted"},
      {"model.moe.capacity={min_capacity = 1}",
       "model.moe.capacity.min_capacity: by default nothing is dropped, so there is no capacity"},
      {"model.moe.capacity={drop_in_evaluation = true}",
       "model.moe.capacity.drop_in_evaluation: by default nothing is dropped"},
      {"model.moe.capacity={group_sequences = 2}",
       "model.moe.capacity.group_sequences: nothing is dropped, and this router's tokens do not"},
      {"model.moe.capacity={factor = 1.5}", "model.moe.capacity.factor: by default nothing is dropped"}};
  for (const auto& [text, expected] : mistakes)
    EXPECT_THAT(message(text), testing::StartsWith(expected)) << text;
}

TEST_F(RunConfig, overrides_take_toml_values_and_bare_words) {
  const auto config = train::read_run_config(
      folder_ / "run.toml",
      {"train.steps=9", "train.dtype=float32", "model.moe_layers=[true, false]", "model.dense_ffn_size=5"});
  EXPECT_EQ(config.train.steps, 9);
  EXPECT_EQ(config.train.dtype, "float32");
  EXPECT_THAT(config.model.moe_layers, testing::ElementsAre(true, false));
}

TEST(RunConfigJson, first_difference_names_key_and_both_values) {
  const Json ours = {{"steps", 3}, {"moe", {{"top_k", 2}, {"score", "softmax"}}}};
  Json theirs = ours;
  EXPECT_EQ(train::first_difference(ours, theirs, "model"), "");
  theirs["moe"]["top_k"] = 4;
  EXPECT_EQ(train::first_difference(ours, theirs, "model"), "model.moe.top_k = 2, not 4");
  theirs = ours;
  theirs["moe"].erase("score");
  EXPECT_EQ(train::first_difference(ours, theirs, "model"), "model.moe.score = \"softmax\", not null");
  EXPECT_EQ(train::first_difference(theirs, ours, "model"), "model.moe.score = null, not \"softmax\"");
}

TEST(Freeze, patterns) {
  EXPECT_TRUE(train::matches("*.gate.*", "model.layers.0.mlp.gate.weight"));
  EXPECT_TRUE(train::matches("*", ""));
  EXPECT_FALSE(train::matches("*.gate", "model.gate.weight"));
}

TEST(Freeze, mistakes_are_named) {
  model::ModelConfig config;
  config.vocab_size = config.hidden_size = config.num_layers = config.num_heads = 2;
  config.moe.ffn_size = 2;
  model::complete(config);
  EXPECT_THROW(train::find_frozen(config, {"nothing.like.this"}), ConfigError);
  EXPECT_THROW(train::find_frozen(config, {"*"}), ConfigError);
}

}  // namespace
}  // namespace collegium
