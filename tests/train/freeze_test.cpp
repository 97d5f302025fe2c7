// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/freeze.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/equal.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/error.h"
#include "collegium/comm/local/local.h"
#include "collegium/train/trainer.h"
#include "tests/support/tensors.h"
#include "tests/support/tiny_run.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;

class Freezing : public test::TinyRun {
 protected:
  train::RunConfig config(const std::string& patterns) const {
    return train::read_run_config(folder_ / "run.toml",
                                  {"model.freeze=" + patterns, "model.moe.router.bias_balancing=true",
                                   "optimizer.weight_decay=0.3", "optimizer.decay_norms=true"});
  }

  // On-disk names of the tensors that two steps did not change.
  static std::set<std::string> unchanged(train::Trainer& trainer) {
    const auto snapshot = [&] {
      std::map<std::string, at::Tensor> all;
      const auto& parameters = trainer.decoder().parameters();
      for (const auto& disk : model::list_disk_tensors(trainer.decoder().config(), parameters))
        all[disk.name] = model::disk_view(disk, parameters[disk.parameter].value.detach()).clone();
      return all;
    };
    const auto before = snapshot();
    for (int i = 0; i < 2; ++i) trainer.step();
    std::set<std::string> same;
    for (const auto& [name, value] : snapshot()) {
      if (at::equal(value, before.at(name))) same.insert(name);
    }
    return same;
  }
};

std::set<std::string> names_of(const model::ModelConfig& config, const std::vector<std::string>& patterns) {
  std::set<std::string> names;
  for (const auto& disk : model::list_disk_tensors(config, model::list_parameters(config))) {
    for (const std::string& pattern : patterns) {
      if (train::matches(pattern, disk.name)) names.insert(disk.name);
    }
  }
  return names;
}

// bias_balancing makes a model that only collegium_moe expresses, but the names stay those of mixtral.
TEST_F(Freezing, exactly_what_matches_stays) {
  const std::vector<std::vector<std::string>> all_patterns = {
      {"*.experts.0.*"},                    // one expert
      {"*.w1.weight"},                      // every gate matrix, half of a fused one
      {"model.layers.1.*.experts.2.w2.*"},  // one matrix of one expert
      {"*.experts.*"},                      // whole parameters
      {"*.self_attn.q_proj.weight"},        // a whole parameter
      {"*.experts.1.*", "*.experts.1.w3.*", "model.norm.weight"}};
  for (const auto& patterns : all_patterns) {
    SCOPED_TRACE(patterns[0]);
    train::Trainer trainer(config(Json(patterns).dump()));
    EXPECT_EQ(unchanged(trainer), names_of(trainer.decoder().config(), patterns));
  }
}

TEST_F(Freezing, expert_bias_can_be_frozen) {
  train::Trainer free(config("[\"model.norm.weight\"]"));
  const std::string bias = "*expert_bias*";
  const auto biases = names_of(free.decoder().config(), {bias, "*e_score_correction_bias*"});
  ASSERT_EQ(biases.size(), 2U);
  train::Trainer frozen(config(Json(std::vector<std::string>(biases.begin(), biases.end())).dump()));
  EXPECT_EQ(unchanged(frozen), biases);
}

TEST_F(Freezing, norm_counts_what_is_trained) {
  train::Trainer free(config("[\"model.norm.weight\"]"));
  train::Trainer part(config("[\"model.norm.weight\", \"*.experts.0.*\"]"));
  const double all = free.compute_gradients().gradient.by_kind.at("expert");
  const double rest = part.compute_gradients().gradient.by_kind.at("expert");
  double squares = 0.0;
  for (const optim::Slot& slot : free.masters().slots()) {
    if (slot.kind != model::ParameterKind::kExpert) continue;
    squares += slot.gradient.narrow(0, 1, slot.gradient.size(0) - 1).square().sum().item<double>();
  }
  EXPECT_LT(rest, all);
  EXPECT_NEAR(rest, std::sqrt(squares), 1e-12 * all);
}

TEST_F(Freezing, resumed_run_keeps_what_is_frozen) {
  fs::create_directories(folder_ / "run");
  const train::RunConfig run = config("[\"*.experts.0.*\", \"*.w3.weight\"]");
  train::Trainer whole(run);
  train::Trainer first(run);
  for (int i = 0; i < 4; ++i) whole.step();
  for (int i = 0; i < 2; ++i) first.step();
  const fs::path checkpoint = first.save(0.0);
  train::Trainer second(run);
  second.resume(checkpoint, /*weights_only=*/false);
  for (int i = 0; i < 2; ++i) second.step();
  for (std::size_t i = 0; i < whole.masters().slots().size(); ++i)
    EXPECT_TRUE(at::equal(whole.masters().slots()[i].master, second.masters().slots()[i].master));
}

// With two experts on each of two ranks, a pattern names an expert that only one of them holds, or both of
// one rank.
TEST_F(Freezing, does_not_depend_on_the_ranks) {
  for (const char* patterns : {"[\"*.experts.3.*\"]", "[\"*.experts.0.*\", \"*.experts.1.*\"]"}) {
    train::Trainer alone(config(patterns));
    for (int i = 0; i < 2; ++i) alone.step();
    comm::run_ranks(2, [&](comm::Communicator& world) {
      train::Trainer trainer(config(patterns), world.shared_from_this());
      for (int i = 0; i < 2; ++i) trainer.step();
      ASSERT_EQ(trainer.masters().slots().size(), alone.masters().slots().size());
      for (std::size_t i = 0; i < alone.masters().slots().size(); ++i) {
        const optim::Slot& slot = trainer.masters().slots()[i];
        at::Tensor expected = alone.masters().slots()[i].master;
        if (slot.kind == model::ParameterKind::kExpert)
          expected = expected.narrow(0, slot.first_expert, slot.master.size(0));
        EXPECT_LE(test::relative_difference(slot.master, expected), 1e-11) << slot.name;
      }
    });
  }
}

TEST_F(Freezing, mistakes_are_named) {
  const auto refused = [&](const std::string& patterns) {
    try {
      const train::Trainer trainer(config(patterns));
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_THAT(
      refused("[\"*.experts.9.*\"]"),
      testing::StartsWith("model.freeze \"*.experts.9.*\": matches no tensor (names are those on disk"));
  EXPECT_EQ(refused("[\"*\"]"), "model.freeze: nothing is left to train");
  EXPECT_EQ(refused("[\"model.[!x]*\", \"*\"]").substr(0, 12), "model.freeze");
}

}  // namespace
}  // namespace collegium
