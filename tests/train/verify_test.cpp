// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/verify.h"

#include <ATen/core/Tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "collegium/base/error.h"
#include "collegium/comm/local/local.h"
#include "collegium/train/verify_cases.h"

namespace collegium {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class Verify : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() /
        ("collegium_verify_" + std::string(testing::UnitTest::GetInstance()->current_test_info()->name()));
    fs::remove_all(folder_);
    train::write_verification_corpus(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path folder_;
};

TEST_F(Verify, finds_what_differs_and_where) {
  const train::RunConfig config = train::verification_run(folder_);
  const train::Snapshot reference = train::take_snapshot(config, comm::single_rank_world(), 1);
  train::Snapshot other = train::take_snapshot(config, comm::single_rank_world(), 1);
  EXPECT_TRUE(train::bit_identical(other, reference));
  EXPECT_EQ(train::compare(other, reference).largest(), 0.0);

  at::Tensor& gradient = other.gradients.at("step 1: layers.2.moe.down");
  gradient = gradient * (1.0 + 1e-8);
  other.parameters.at("embed_tokens")[3][1] += 1e-4;
  const train::Difference difference = train::compare(other, reference);
  EXPECT_NEAR(difference.gradient, 1e-8, 1e-12);
  EXPECT_EQ(difference.worst_gradient, "step 1: layers.2.moe.down");
  EXPECT_EQ(difference.worst_parameter, "embed_tokens");
  EXPECT_GT(difference.largest(), train::kExactBound);
  EXPECT_FALSE(train::bit_identical(other, reference));

  gradient.view({-1})[0] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(std::isinf(train::compare(other, reference).gradient));
}

// A query that sees one key alone has no gradient for it but rounding, which any other order changes wholly.
TEST_F(Verify, gradients_whose_parts_cancel_are_held_against_their_rounding) {
  train::RunConfig config = train::verification_run(folder_);
  config.model.sliding_window = 1;
  config.optimizer.learning_rate = 1e-4;  // AdamW makes more of such a gradient than it is
  config.train.dtype = "float32";
  std::vector<train::VerifyRow> rows;
  train::VerifyRequest request{
      .config = config, .steps = 1, .on_row = [&](const auto& row) { rows.push_back(row); }};
  comm::run_ranks(
      3, [&](comm::Communicator& world) { EXPECT_TRUE(train::verify(request, world.shared_from_this())); });
  for (const train::VerifyRow& row : rows) EXPECT_TRUE(row.passed) << train::row_json(row).dump();
  EXPECT_EQ(std::count_if(rows.begin(), rows.end(), [](const auto& row) { return row.section == "float32"; }),
            12);
}

TEST_F(Verify, rounding_hides_no_wrong_gradient) {
  const train::RunConfig exact_config = train::verification_run(folder_);
  train::RunConfig config = exact_config;
  config.train.dtype = "float32";
  const train::RoutingFiles replay{.record = {}, .replay = folder_ / "routing"};
  train::Snapshot reference =
      train::take_snapshot(config, comm::single_rank_world(), 1, {.record = replay.replay, .replay = {}});
  const train::Snapshot exact = train::take_snapshot(exact_config, comm::single_rank_world(), 1, replay);
  const double bound = train::low_precision_bound(at::kFloat, config.model.num_layers);
  reference.least_norms = train::least_norms_of(reference, exact, bound);
  EXPECT_LT(train::compare(exact, reference).gradient, bound);
  for (const auto& [name, gradient] : reference.gradients) {
    train::Snapshot wrong = reference;
    wrong.gradients.at(name) = gradient * 1.001;
    EXPECT_GT(train::compare(wrong, reference).gradient, bound) << name;
  }
}

// Another optimizer is what a wrong gradient scale would look like from outside.
TEST_F(Verify, another_run_is_not_equal) {
  train::RunConfig config = train::verification_run(folder_);
  const train::Snapshot reference = train::take_snapshot(config, comm::single_rank_world(), 2);
  config.model.moe.balance.gshard *= 1.001;
  const train::Difference difference =
      train::compare(train::take_snapshot(config, comm::single_rank_world(), 2), reference);
  EXPECT_GT(difference.gradient, 1e-8);
  EXPECT_GT(difference.loss, 1e-8);
}

TEST_F(Verify, more_ranks_than_sequences_and_experts_that_do_not_divide) {
  constexpr int kRanks = 7;  // micro-steps of 3 sequences: four ranks have none; 11 experts: 2 2 2 2 1 1 1
  std::vector<train::VerifyRow> rows;
  train::VerifyRequest request{.config = train::verification_run(folder_),
                               .steps = 2,
                               .on_row = [&](const auto& row) { rows.push_back(row); }};
  comm::run_ranks(kRanks, [&](comm::Communicator& world) {
    EXPECT_TRUE(train::verify(request, world.shared_from_this()));
  });
  EXPECT_EQ(rows.size(), 12U);
  for (const train::VerifyRow& row : rows) {
    EXPECT_LE(row.difference.largest(), train::kExactBound) << row.layout;
    EXPECT_TRUE(row.ranks_agree && row.rerun_identical) << row.layout;
  }
}

TEST_F(Verify, ranks_with_different_runs_are_refused) {
  const auto body = [&](comm::Communicator& world) {
    train::RunConfig config = train::verification_run(folder_);
    if (world.rank() == 2) config.train.seed = 4;
    train::Trainer trainer(config, world.shared_from_this());
  };
  try {
    comm::run_ranks(3, body);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("rank 2 was given another run than rank 0: train.seed = 4, not 3"));
  }
}

TEST_F(Verify, routing_recorded_on_three_ranks_replays_on_one) {
  const train::RunConfig config = train::verification_run(folder_);
  const auto record = [&](comm::Communicator& world) {
    train::take_snapshot(config, world.shared_from_this(), 2, {.record = folder_ / "routing", .replay = {}});
  };
  comm::run_ranks(3, record);
  const train::Snapshot plain = train::take_snapshot(config, comm::single_rank_world(), 2);
  const train::Snapshot replayed = train::take_snapshot(config, comm::single_rank_world(), 2,
                                                        {.record = {}, .replay = folder_ / "routing"});
  EXPECT_TRUE(train::bit_identical(plain, replayed));
}

TEST(Layouts, divide_the_ranks_and_fill_nodes_evenly) {
  std::set<std::string> names;
  for (const train::Layout& layout : train::list_layouts({0, 0, 0, 0, 1, 1}, 11)) names.insert(layout.name());
  EXPECT_TRUE(names.contains("ep 1"));
  EXPECT_TRUE(names.contains("ep 6, allgather, overlap"));
  EXPECT_TRUE(names.contains("ep 2, two_level"));
  EXPECT_FALSE(names.contains("ep 3, two_level"));  // ranks 3, 4, 5: one on node 0, two on node 1
  EXPECT_FALSE(names.contains("ep 6, two_level"));
  EXPECT_FALSE(names.contains("ep 4, uneven"));
  EXPECT_TRUE(names.contains("ep 2, shared_memory"));
  EXPECT_FALSE(names.contains("ep 3, shared_memory"));
}

TEST(Pairwise, holds_every_possible_pair) {
  const std::vector<std::size_t> sizes = {3, 4, 2, 5};
  const auto valid = [](const auto& row) { return row[0] != 0 || row[3] != 4; };
  std::set<std::array<std::size_t, 4>> pairs;
  const auto rows = train::pairwise_rows(sizes, valid);
  for (const auto& row : rows) {
    EXPECT_TRUE(valid(row));
    for (std::size_t a = 0; a < 4; ++a) {
      for (std::size_t b = a + 1; b < 4; ++b) pairs.insert({a, row[a], b, row[b]});
    }
  }
  EXPECT_EQ(pairs.size(), 3U * 4 + 3 * 2 + (3 * 5 - 1) + 4 * 2 + 4 * 5 + 2 * 5);
  EXPECT_LT(rows.size(), 40U);
}

}  // namespace
}  // namespace collegium
