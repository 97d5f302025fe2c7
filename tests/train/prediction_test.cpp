// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/prediction.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "collegium/base/file.h"
#include "collegium/comm/local/local.h"
#include "collegium/model/account.h"
#include "collegium/plan/account.h"
#include "collegium/train/trainer.h"
#include "tests/support/tiny_run.h"

namespace collegium {
namespace {

class Prediction : public test::TinyRun {
 protected:
  // Two steps of a run, both audited; every rank's ledger against the planner.
  void expect_equal_bytes(int ranks, int ranks_per_node, const std::vector<std::string>& overrides) {
    SCOPED_TRACE(testing::PrintToString(ranks) + " ranks: " + testing::PrintToString(overrides));
    comm::run_ranks(ranks,
                    [&](comm::Communicator& world) {
                      train::Trainer trainer(train::read_run_config(folder_ / "run.toml", overrides),
                                             world.shared_from_this());
                      for (int step = 0; step < 2; ++step) {
                        trainer.audit_next_step();
                        const train::StepReport report = trainer.step();
                        ASSERT_TRUE(report.traffic);
                        double sent = 0.0;
                        for (std::size_t arrow = 0; arrow < report.traffic->measured.size(); ++arrow) {
                          const plan::SentBytes& predicted = report.traffic->predicted.at(arrow);
                          const plan::SentBytes& measured = report.traffic->measured.at(arrow);
                          EXPECT_EQ(predicted.within_nodes, measured.within_nodes) << "arrow " << arrow;
                          EXPECT_EQ(predicted.between_nodes, measured.between_nodes) << "arrow " << arrow;
                          sent += measured.total();
                        }
                        EXPECT_GT(sent, 0.0);
                      }
                      EXPECT_FALSE(trainer.step().traffic);
                    },
                    {.ranks_per_node = ranks_per_node});
  }
};

std::vector<std::string> exchanges() {
  std::vector<std::string> names;
  for (const auto& [name, kind] : EnumNames<moe::DispatcherKind>::names) names.emplace_back(name);
  return names;
}

// Its ranks must be on one node.
constexpr std::string_view kOneNode = "shared_memory";

TEST_F(Prediction, ledger_equals_planner_on_two_ranks) {
  for (const std::string& exchange : exchanges()) {
    const std::string kind = "parallel.dispatcher.kind=" + exchange;
    expect_equal_bytes(2, 0, {kind});
    const int per_node = exchange == kOneNode ? 2 : 1;
    expect_equal_bytes(2, per_node, {kind, "train.dtype=bfloat16", "model.moe.capacity.drop_policy=none"});
    expect_equal_bytes(2, per_node, {kind, "train.recompute=true", "parallel.overlap.chunks=3"});
  }
}

// two_level for four experts a token on two ranks.
TEST_F(Prediction, ledger_equals_planner_where_the_dispatcher_is_chosen) {
  for (const char* top_k : {"model.moe.top_k=2", "model.moe.top_k=4"})
    expect_equal_bytes(2, 1, {top_k, "parallel.dispatcher.kind=auto"});
}

TEST_F(Prediction, ledger_equals_planner_on_four_ranks) {
  for (const std::string& exchange : exchanges()) {
    const std::string kind = "parallel.dispatcher.kind=" + exchange;
    expect_equal_bytes(4, exchange == kOneNode ? 4 : 2,
                       {kind, "batch.micro_sequences=6", "train.dtype=bfloat16"});
    expect_equal_bytes(4, 2, {kind, "parallel.ep=2", "batch.micro_sequences=5", "train.dtype=float32"});
    if (exchange == "two_level" || exchange == "allgather")
      expect_equal_bytes(4, 2, {kind, "parallel.dispatcher.combine_fp32=true", "train.dtype=bfloat16"});
  }
}

// The planner, which knows no tensors, counts the values that a rank holds.
TEST_F(Prediction, tensors_of_a_rank_are_those_it_has) {
  for (const char* dtype : {"bfloat16", "float32", "float64"}) {
    for (const char* norm : {"none", "per_head"}) {
      const train::Trainer trainer(train::read_run_config(
          folder_ / "run.toml", {std::string("train.dtype=") + dtype, std::string("model.qk_norm=") + norm,
                                 "model.family=collegium_moe"}));
      double weights = 0.0;
      double optimizer = 0.0;
      double gradients = 0.0;
      for (const optim::Slot& slot : trainer.masters().slots()) {
        weights += static_cast<double>(slot.value.nbytes());
        gradients += static_cast<double>(slot.gradient.nbytes());
        optimizer += static_cast<double>(slot.first_moment.nbytes() + slot.second_moment.nbytes());
        if (!slot.master.is_alias_of(slot.value)) optimizer += static_cast<double>(slot.master.nbytes());
      }
      const plan::OwnTensors tensors = plan::own_tensors(trainer.own_run());
      EXPECT_EQ(tensors.weights, weights);
      EXPECT_EQ(tensors.gradients, gradients);
      EXPECT_EQ(tensors.optimizer, optimizer);
    }
  }
}

// 1.5 of 4 experts compute a token, although any of the 4 may choose it.
TEST_F(Prediction, experts_that_choose_compute_what_they_take) {
  const train::RunConfig config = train::read_run_config(
      folder_ / "run.toml",
      {"model.moe.router.selection=expert_choice", "model.moe.router.allow_non_causal=true",
       "model.moe.router.order=score_first", "model.moe.router.renormalize=never",
       "model.moe.router.expert_choice_factor=\"1.5\"", "model.moe.capacity.drop_policy=none"});
  const plan::ModelSpec spec = train::model_spec(config.model);
  EXPECT_EQ(spec.top_k, 4);
  EXPECT_EQ(spec.experts_per_token(), 1.5);
  const model::ParameterAccount account = model::count_parameters(config.model);
  EXPECT_EQ(account.total - account.active, account.experts * 5 / 8);
  EXPECT_DOUBLE_EQ(plan::forward_flops_per_token(spec, 12).experts,
                   2.0 * static_cast<double>(account.experts) * 1.5 / 4.0);
}

TEST_F(Prediction, every_parameter_is_counted) {
  for (const std::vector<std::string>& changes :
       {std::vector<std::string>{"model.moe.router.noise=noisy_top_k"},
        {"model.moe.shared_expert={kind = \"sum\", ffn_size = 4}"},
        {"model.moe.shared_expert={kind = \"gated\", ffn_size = 4}"},
        {"model.moe.shared_expert={kind = \"residual_mix\", ffn_size = 4}"},
        {"model.moe.router.bias_balancing=true", "model.moe.router.num_groups=2",
         "model.moe.router.top_groups=1"},
        {"model.moe_layers=[true, false]", "model.dense_ffn_size=5", "model.tie_embeddings=true"},
        {"model.family=olmoe", "model.qk_norm=projection"},
        {"model.family=qwen3_moe", "model.qk_norm=per_head"}}) {
    train::RunConfig config = train::read_run_config(folder_ / "run.toml", changes);
    config.model.vocab_size = 23;
    EXPECT_EQ(plan::account(train::model_spec(config.model)).total,
              model::count_parameters(config.model).total)
        << changes.front();
  }
}

TEST_F(Prediction, comparison_names_what_was_predicted) {
  train::RunConfig config = train::read_run_config(folder_ / "run.toml", {});
  train::Trainer trainer(config);
  const train::MeasuredRun measured{
      .memory_bytes = 2e9, .step_s = 0.5, .all_to_all_share = 0.25, .traffic = {}};
  const auto untimed = train::compare_run(config, trainer.own_run(), measured);
  EXPECT_FALSE(untimed[1].predicted);
  EXPECT_THAT(train::comparison_text(untimed), testing::HasSubstr("500 ms"));
  config.planner.cluster = "cpu-2core";
  // A cluster has no rate of float64 products.
  EXPECT_FALSE(train::compare_run(config, trainer.own_run(), measured)[1].predicted);
  config.train.dtype = "float32";
  const auto timed = train::compare_run(config, trainer.own_run(), measured);
  ASSERT_TRUE(timed[1].predicted);
  EXPECT_GT(*timed[1].predicted, 0.0);
  EXPECT_EQ(train::comparison_json(timed)["step"]["measured"], 0.5);
}

}  // namespace
}  // namespace collegium
