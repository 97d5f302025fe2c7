// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/trainer.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/equal.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "collegium/base/error.h"
#include "tests/support/tensors.h"
#include "tests/support/tiny_run.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;

class Training : public test::TinyRun {
 protected:
  train::RunConfig config(const std::vector<std::string>& overrides = {}) const {
    return train::read_run_config(folder_ / "run.toml", overrides);
  }
  static at::Tensor all_masters(const train::Trainer& trainer) {
    std::vector<at::Tensor> parts;
    for (const optim::Slot& slot : trainer.masters().slots())
      parts.push_back(slot.master.reshape({-1}).clone());
    return at::cat(parts);
  }
};

TEST_F(Training, loss_falls) {
  train::Trainer trainer(config({"train.steps=40", "model.moe.capacity.drop_policy=none"}));
  const double first = trainer.step().loss;
  double last = first;
  for (int i = 1; i < 40; ++i) last = trainer.step().loss;
  EXPECT_LT(last, 0.7 * first);
}

// A micro-step is a part of the global batch: cutting it otherwise only changes the order of summation.
TEST_F(Training, does_not_depend_on_the_micro_steps) {
  train::Trainer whole(config({"batch.micro_sequences=6"}));
  for (int i = 0; i < 3; ++i) whole.step();
  for (const char* size : {"1", "2", "3", "4"}) {
    train::Trainer cut(config({std::string("batch.micro_sequences=") + size}));
    for (int i = 0; i < 3; ++i) cut.step();
    EXPECT_LE(test::relative_difference(all_masters(cut), all_masters(whole)), 1e-11) << size;
  }
}

TEST_F(Training, recomputation_and_reruns_are_bit_identical) {
  train::Trainer plain(config());
  train::Trainer again(config());
  train::Trainer recomputed(config({"train.recompute=true"}));
  for (int i = 0; i < 3; ++i) {
    const double loss = plain.step().loss;
    EXPECT_EQ(again.step().loss, loss);
    EXPECT_EQ(recomputed.step().loss, loss);
  }
  EXPECT_TRUE(at::equal(all_masters(again), all_masters(plain)));
  EXPECT_TRUE(at::equal(all_masters(recomputed), all_masters(plain)));
}

TEST_F(Training, resumed_run_is_bit_identical) {
  for (const char* dtype : {"float64", "float32", "bfloat16"}) {
    const std::vector<std::string> overrides = {std::string("train.dtype=") + dtype,
                                                "model.moe.router.bias_balancing=true"};
    fs::remove_all(folder_ / "run");
    fs::create_directories(folder_ / "run");
    train::Trainer whole(config(overrides));
    train::Trainer first(config(overrides));
    for (int i = 0; i < 5; ++i) whole.step();
    for (int i = 0; i < 2; ++i) first.step();
    const fs::path checkpoint = first.save(0.0);
    train::Trainer second(config(overrides));
    second.resume(checkpoint, /*weights_only=*/false);
    for (int i = 2; i < 5; ++i) second.step();
    EXPECT_TRUE(at::equal(all_masters(second), all_masters(whole))) << dtype;
  }
}

TEST_F(Training, replayed_routing_gives_the_recorded_run) {
  train::Trainer recorded(config());
  recorded.record_routing(folder_ / "routing");
  train::Trainer replayed(config());
  for (int i = 0; i < 2; ++i) recorded.step();
  replayed.replay_routing(folder_ / "routing", 2);
  for (int i = 0; i < 2; ++i) replayed.step();
  EXPECT_TRUE(at::equal(all_masters(replayed), all_masters(recorded)));
}

// Before the first step, not after an hour of training.
TEST_F(Training, record_that_is_too_short_or_of_another_shape_is_refused_beforehand) {
  {
    train::Trainer recorded(config());
    recorded.record_routing(folder_ / "routing");
    for (int i = 0; i < 2; ++i) recorded.step();
  }
  const auto refusal = [&](const std::vector<std::string>& overrides, std::int64_t last_step) {
    train::Trainer replayed(config(overrides));
    try {
      replayed.replay_routing(folder_ / "routing", last_step);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal({}, 2), "accepted");
  EXPECT_THAT(refusal({}, 3), testing::HasSubstr("routing: no routing of step 3, micro-step 0, layer 0"));
  EXPECT_THAT(refusal({"model.moe.top_k=3"}, 2), testing::HasSubstr("this run needs"));
}

TEST_F(Training, expert_choice_is_recorded_with_every_expert) {
  const std::vector<std::string> overrides = {
      "model.moe.router.selection=expert_choice", "model.moe.router.allow_non_causal=true",
      "model.moe.router.renormalize=never", "model.moe.capacity.drop_policy=none"};
  train::Trainer recorded(config(overrides));
  recorded.record_routing(folder_ / "routing");
  train::Trainer replayed(config(overrides));
  recorded.step();
  replayed.replay_routing(folder_ / "routing", 1);
  replayed.step();
  EXPECT_TRUE(at::equal(all_masters(replayed), all_masters(recorded)));
}

TEST_F(Training, record_of_a_resumed_run_is_that_of_the_whole_run) {
  fs::create_directories(folder_ / "run");
  {
    train::Trainer whole(config());
    whole.record_routing(folder_ / "whole");
    train::Trainer first(config());
    first.record_routing(folder_ / "parts");
    for (int i = 0; i < 4; ++i) whole.step();
    for (int i = 0; i < 2; ++i) first.step();
    first.save(0.0);
    first.step();  // lost: the run is killed before its next checkpoint
  }
  train::Trainer second(config());
  second.resume(folder_ / "run/step-00000002", /*weights_only=*/false);
  second.record_routing(folder_ / "parts");
  for (int i = 2; i < 4; ++i) second.step();
  train::Trainer replayed(config());
  replayed.replay_routing(folder_ / "parts", 4);
  for (int i = 0; i < 4; ++i) replayed.step();
  EXPECT_EQ(read_file(folder_ / "parts"), read_file(folder_ / "whole"));
}

TEST_F(Training, run_that_exceeds_the_memory_is_refused) {
  const std::vector<std::vector<std::string>> sizes = {
      {"model.hidden_size=1000000000", "model.head_dim=8"},
      {"model.moe.num_experts=1000000", "model.moe.ffn_size=100000"},
      {"model.moe.ffn_size=2000000000", "model.hidden_size=10000", "model.head_dim=8"},
      {"batch.global_batch=300000000", "batch.micro_sequences=300000000", "model.hidden_size=4096"}};
  for (const auto& overrides : sizes) {
    try {
      const train::Trainer trainer(config(overrides));
      ADD_FAILURE() << overrides[0];
    } catch (const ConfigError& error) {
      EXPECT_THAT(
          error.what(),
          testing::AllOf(testing::StartsWith("the run needs "),
                         testing::HasSubstr("for activations of the rank on this machine, which has ")));
    }
  }
}

TEST_F(Training, what_belongs_to_the_tokenizer_is_carried_over) {
  fs::create_directories(folder_ / "run");
  train::Trainer first(config());
  const fs::path start = first.save(0.0);
  const std::vector<std::string> names = {"tokenizer.json", "tokenizer_config.json",
                                          "special_tokens_map.json", "generation_config.json",
                                          "tokenizer.model"};
  for (const std::string& name : names) write_file_atomically(start / name, "of the model: " + name);
  write_file_atomically(folder_ / "tune.toml", "run_folder = \"" + (folder_ / "tuned").string() +
                                                   "\"\n[data]\npath = \"" + (folder_ / "data").string() +
                                                   "\"\nsequence_length = 12\n[model]\ninit = \"" +
                                                   start.string() + "\"\n");
  fs::create_directories(folder_ / "tuned");
  train::Trainer tuned(train::read_run_config(folder_ / "tune.toml", {"train.dtype=float64"}));
  // Whatever becomes of the files while the run is under way: the tokens were made by what it found.
  for (const std::string& name : names) write_file_atomically(start / name, "another one");
  const fs::path checkpoint = tuned.save(0.0);
  for (const std::string& name : names) EXPECT_EQ(read_file(checkpoint / name), "of the model: " + name);
  train::verify_checkpoint(checkpoint);
  // Tokens of another tokenizer: only what does not belong to one.
  train::Trainer other(
      train::read_run_config(folder_ / "tune.toml", {"train.dtype=float64", "data.any_tokenizer=true"}));
  EXPECT_FALSE(fs::exists(other.save(0.0) / "tokenizer.json"));
}

TEST_F(Training, frozen_parameters_stay_and_starting_from_a_folder_works) {
  fs::create_directories(folder_ / "run");
  train::Trainer first(config());
  first.step();
  const fs::path checkpoint = first.save(0.0);
  std::ofstream(folder_ / "tune.toml")
      << "run_folder = \"" << (folder_ / "run2").string() << "\"\n[data]\npath = \""
      << (folder_ / "data").string()
      << "\"\nsequence_length = 12\n[batch]\nglobal_batch = 2\nmicro_sequences = 2\n[train]\ndtype = "
         "\"float64\"\n[model]\ninit = \""
      << checkpoint.string() << "\"\nfreeze = [\"*.gate.weight\", \"model.embed_tokens.*\"]\n";
  train::Trainer tuned(train::read_run_config(folder_ / "tune.toml", {}));
  const at::Tensor router = tuned.decoder().value("layers.0.moe.router").clone();
  const at::Tensor experts = tuned.decoder().value("layers.0.moe.down").clone();
  EXPECT_TRUE(at::equal(router, first.decoder().value("layers.0.moe.router")));
  tuned.step();
  EXPECT_TRUE(at::equal(tuned.decoder().value("layers.0.moe.router"), router));
  EXPECT_FALSE(at::equal(tuned.decoder().value("layers.0.moe.down"), experts));
}

TEST_F(Training, balancing_lowers_the_violation) {
  const auto violation = [&](const std::string& coefficient) {
    train::Trainer trainer(config({"train.steps=120", "model.moe.capacity.drop_policy=none",
                                   "model.moe.balance.load_balance=" + coefficient,
                                   "model.moe.balance.load_balance_scope=batch"}));
    double sum = 0.0;
    for (int i = 0; i < 120; ++i) {
      const auto report = trainer.step();
      if (i >= 80) sum += report.layers[0].max_violation + report.layers[1].max_violation;
    }
    return sum;
  };
  EXPECT_LT(violation("1.0"), 0.7 * violation("0.0"));
}

TEST_F(Training, non_finite_loss_names_step_and_tensor) {
  train::Trainer trainer(config());
  trainer.step();
  at::NoGradGuard no_grad;
  trainer.decoder().value("layers.1.moe.down")[2][0][0].fill_(std::numeric_limits<double>::quiet_NaN());
  try {
    trainer.step();
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(),
                testing::HasSubstr("step 2: the loss is nan: parameter layers.1.moe.down is not finite"));
  }
}

TEST_F(Training, damaged_checkpoints_are_named) {
  fs::create_directories(folder_ / "run");
  train::Trainer trainer(config());
  trainer.step();
  const fs::path checkpoint = trainer.save(0.0);
  for (const char* name :
       {"model.safetensors", "config.json", "training/optimizer-00000.safetensors", "training/state.json"}) {
    const std::string content = read_file(checkpoint / name);
    std::string damaged = content;
    damaged[damaged.size() / 2] = static_cast<char>(damaged[damaged.size() / 2] ^ 1);
    write_file_atomically(checkpoint / name, damaged);
    try {
      trainer.resume(checkpoint, false);
      ADD_FAILURE() << name;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr(std::string(name) + " is damaged or was changed"));
    }
    write_file_atomically(checkpoint / name, content.substr(1));
    EXPECT_THROW(trainer.resume(checkpoint, false), ConfigError);
    write_file_atomically(checkpoint / name, content);
  }
  trainer.resume(checkpoint, false);
  fs::remove(checkpoint / "model.safetensors");
  EXPECT_THROW(trainer.resume(checkpoint, false), ConfigError);
}

TEST_F(Training, keeps_the_last_checkpoints_and_passes_over_uncommitted_ones) {
  fs::create_directories(folder_ / "run");
  train::Trainer trainer(config());
  for (int i = 0; i < 4; ++i) {
    trainer.step();
    trainer.save(0.0);
  }
  fs::create_directories(folder_ / "run/step-00000009");
  for (const char* name : {"step-99999999999999999999999", "step--1", "step-1x"}) {
    fs::create_directories(folder_ / "run" / name / "training");
    write_file_atomically(folder_ / "run" / name / "training/manifest.json", "{}");
  }
  fs::create_directories(folder_ / "run/step-00000010.tmp-1/training");
  EXPECT_EQ(train::find_latest_checkpoint(folder_ / "run")->filename(), "step-00000004");
  EXPECT_TRUE(fs::exists(folder_ / "run/step-00000003"));
  EXPECT_FALSE(fs::exists(folder_ / "run/step-00000002"));
  train::remove_temporary_folders(folder_ / "run");
  EXPECT_FALSE(fs::exists(folder_ / "run/step-00000010.tmp-1"));
}

}  // namespace
}  // namespace collegium
