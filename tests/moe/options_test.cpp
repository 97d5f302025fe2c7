// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/options.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <tuple>

#include "collegium/moe/balance.h"
#include "collegium/moe/capacity.h"
#include "collegium/moe/selection.h"
#include "tests/moe/cases.h"
#include "tests/moe/router_oracle.h"
#include "tests/support/tensors.h"

namespace collegium {
namespace {

struct Mistake {
  std::string message;
  std::function<void(moe::MoeOptions&)> make;
};

std::function<void(moe::MoeOptions&)> by_experts(const std::function<void(moe::MoeOptions&)>& change) {
  return [change](moe::MoeOptions& o) {
    o.router.selection = moe::Selection::kExpertChoice;
    o.router.allow_non_causal = true;
    o.router.renormalize = moe::Renormalize::kNever;
    change(o);
  };
}

void expect_refused(const std::vector<Mistake>& mistakes) {
  for (const Mistake& mistake : mistakes) {
    moe::MoeOptions options = test::base_options();
    mistake.make(options);
    try {
      moe::validate(options, "moe", true, true);
      ADD_FAILURE() << "accepted: " << mistake.message;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), testing::StartsWith(mistake.message));
    }
  }
}

TEST(MoeOptions, combinations_and_sizes_without_a_meaning_are_refused) {
  using namespace moe;
  expect_refused({{"moe.balance.load_cv2 = 0.1: the smooth load is that of",
                   [](MoeOptions& o) {
                     o.balance.load_cv2 = 0.1;
                     o.router.noise = Noise::kNoisyTopK;
                     o.router.bias_balancing = true;
                   }},
                  {"moe.capacity.group_sequences = 4611686018427387904: must lie between",
                   [](MoeOptions& o) { o.capacity.group_sequences = std::int64_t{1} << 62; }},
                  {"moe.shared_expert.ffn_size = 4611686018427387904: must be below 2^31", [](MoeOptions& o) {
                     o.shared_expert = {.kind = moe::SharedExpert::kSum, .ffn_size = std::int64_t{1} << 62};
                   }}});
}

TEST(MoeOptions, every_mistake_has_its_message) {
  using namespace moe;
  expect_refused(
      {{"moe.num_experts = 0: must be at least 1", [](MoeOptions& o) { o.num_experts = 0; }},
       {"moe.top_k = 7: must lie between 1 and num_experts = 6", [](MoeOptions& o) { o.top_k = 7; }},
       {"moe.ffn_size = 0: must be at least 1", [](MoeOptions& o) { o.ffn_size = 0; }},
       {"moe.router.num_groups = 4: must divide num_experts = 6",
        [](MoeOptions& o) { o.router.num_groups = 4; }},
       {"moe.router.top_groups = 3: must lie between 1 and num_groups = 2",
        [](MoeOptions& o) {
          o.router.num_groups = 2;
          o.router.top_groups = 3;
        }},
       {"moe.top_k = 3: 1 groups of 2 experts hold only 2",
        [](MoeOptions& o) {
          o.top_k = 3;
          o.router.num_groups = 3;
        }},
       {"moe.router.scaling_factor = 0: must be positive",
        [](MoeOptions& o) { o.router.scaling_factor = 0; }},
       {"moe.router.jitter_epsilon = 1: must lie in [0, 1)",
        [](MoeOptions& o) { o.router.jitter_epsilon = 1; }},
       {"moe.router.noise = \"random_second_expert\": needs top_k = 2, not 3",
        [](MoeOptions& o) {
          o.top_k = 3;
          o.router.noise = Noise::kRandomSecondExpert;
        }},
       {"moe.router.selection = \"expert_choice\": looks at future tokens",
        [](MoeOptions& o) { o.router.selection = Selection::kExpertChoice; }},
       {"moe.router.expert_choice_factor = \"0\": must be a positive decimal",
        [](MoeOptions& o) { o.router.expert_choice_factor = "0"; }},
       {"moe.capacity.min_capacity = 4294967296: must lie between 0 and 2^31",
        [](MoeOptions& o) { o.capacity.min_capacity = std::int64_t{1} << 32; }},
       {"moe.top_k = 1 with renormalised weights", [](MoeOptions& o) { o.top_k = 1; }},
       {"moe.balance.z_loss = -1: must not be negative", [](MoeOptions& o) { o.balance.z_loss = -1; }},
       {"moe.balance.load_cv2 = 0.1: the smooth load needs", [](MoeOptions& o) { o.balance.load_cv2 = 0.1; }},
       {"moe.capacity.factor = \"1,5\": must be a positive decimal",
        [](MoeOptions& o) { o.capacity.factor = "1,5"; }},
       {"moe.router.forced_skew = 4: must be at most num_experts / top_k = 3",
        [](MoeOptions& o) {
          o.router.selection = Selection::kForcedSkew;
          o.router.forced_skew = 4;
        }},
       {"moe.capacity.group_sequences = 0: must lie between 1 and 2^31",
        [](MoeOptions& o) { o.capacity.group_sequences = 0; }},
       {"moe.router.renormalize = \"after_drop\": nothing is dropped",
        [](MoeOptions& o) { o.router.renormalize = Renormalize::kAfterDrop; }},
       {"moe.shared_expert.ffn_size = 4: has no effect with kind = \"none\"",
        [](MoeOptions& o) { o.shared_expert.ffn_size = 4; }},
       {"moe.shared_expert.ffn_size = 0: must be at least 1 for kind = \"sum\"",
        [](MoeOptions& o) { o.shared_expert.kind = SharedExpert::kSum; }}});
}

TEST(MoeOptions, what_a_selection_would_pass_over_is_refused) {
  using namespace moe;
  expect_refused(
      {{"moe.router.selection = \"sinkhorn\": cannot be combined with router.noise = \"gumbel\"",
        [](MoeOptions& o) {
          o.router.selection = Selection::kSinkhorn;
          o.router.noise = Noise::kGumbel;
        }},
       {"moe.router.selection = \"forced_balance\": cannot be combined with router.noise = \"gumbel\"",
        [](MoeOptions& o) {
          o.router.selection = Selection::kForcedBalance;
          o.router.noise = Noise::kGumbel;
        }},
       {"moe.router.selection = \"forced_balance\": cannot be combined with router.num_groups above 1",
        [](MoeOptions& o) {
          o.router.selection = Selection::kForcedBalance;
          o.router.num_groups = 2;
        }},
       {"moe.router.selection = \"forced_skew\": cannot be combined with router.bias_balancing = true",
        [](MoeOptions& o) {
          o.router.selection = Selection::kForcedSkew;
          o.router.forced_skew = 1;
          o.router.bias_balancing = true;
        }},
       {"moe.router.selection = \"expert_choice\": cannot be combined with router.noise = "
        "\"random_second_expert\"",
        by_experts([](MoeOptions& o) { o.router.noise = Noise::kRandomSecondExpert; })},
       {"moe.router.selection = \"expert_choice\": cannot be combined with router.bias_balancing = true",
        by_experts([](MoeOptions& o) { o.router.bias_balancing = true; })},
       {"moe.router.selection = \"expert_choice\": cannot be combined with router.num_groups above 1",
        by_experts([](MoeOptions& o) { o.router.num_groups = 2; })},
       {"moe.router.selection = \"expert_choice\": cannot be combined with capacity.drop_policy",
        by_experts([](MoeOptions& o) { o.capacity.drop_policy = DropPolicy::kPosition; })},
       {"moe.router.selection = \"expert_choice\": cannot be combined with balance.gshard",
        by_experts([](MoeOptions& o) { o.balance.gshard = 0.1; })},
       {"moe.router.selection = \"expert_choice\": cannot be combined with balance.switch_top1",
        by_experts([](MoeOptions& o) { o.balance.switch_top1 = 0.1; })}});
}

TEST(MoeOptions, renormalized_top_one_is_allowed_in_evaluation) {
  moe::MoeOptions options = test::base_options();
  options.top_k = 1;
  EXPECT_NO_THROW(moe::validate(options, "moe", true, /*training=*/false));
}

TEST(Capacity, is_exact_rational_arithmetic) {
  moe::MoeOptions options = test::base_options();
  options.num_experts = 4;
  options.capacity.factor = "1.1";
  options.capacity.min_capacity = 0;
  EXPECT_EQ(moe::expert_capacity(options, 100),
            55);  // 100 * 2 / 4 * 1.1; in binary floating point its ceiling is 56
  options.capacity.factor = "1.0";
  EXPECT_EQ(moe::expert_capacity(options, 101), 51);
  options.capacity.min_capacity = 64;
  EXPECT_EQ(moe::expert_capacity(options, 101), 64);
}

TEST(Capacity, of_choosing_experts_is_exact_too) {
  moe::MoeOptions options = test::base_options();
  options.num_experts = 49;
  options.router.expert_choice_factor = "1";
  EXPECT_EQ(moe::expert_choice_capacity(options, 98),
            2);  // 98 * (1 / 49) is below 2 in binary floating point
  options.num_experts = 64;
  options.router.expert_choice_factor = "1.4";
  EXPECT_EQ(moe::expert_choice_capacity(options, 2880), 63);
  EXPECT_EQ(moe::expert_choice_capacity(options, 1), 1);
  EXPECT_EQ(moe::expert_choice_capacity(options, 0), 0);
  options.router.expert_choice_factor = "100";
  EXPECT_EQ(moe::expert_choice_capacity(options, 7), 7);
}

TEST(Capacity, experts_of_a_token_on_average) {
  moe::MoeOptions options = test::base_options();
  EXPECT_EQ(moe::experts_per_token(options), static_cast<double>(options.top_k));
  options.router.selection = moe::Selection::kExpertChoice;
  options.router.expert_choice_factor = "1.5";
  EXPECT_EQ(moe::experts_per_token(options), 1.5);
  options.router.expert_choice_factor = "100";
  EXPECT_EQ(moe::experts_per_token(options), static_cast<double>(options.num_experts));
}

TEST(Capacity, the_largest_weights_stay_and_what_is_not_a_number_goes_first) {
  moe::MoeOptions options = test::base_options();
  options.num_experts = 1;
  options.top_k = 1;
  options.capacity = {.drop_policy = moe::DropPolicy::kProbability, .factor = "0.5", .min_capacity = 0};
  moe::TokenContext context;
  context.num_sequences = 1;
  context.sequence_length = 6;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor weights_TK = at::tensor({nan, 0.2F, nan, 0.9F, 0.9F, 0.2F}).unsqueeze(1);
  const at::Tensor kept_TK = moe::kept_slots(options, at::zeros({6, 1}, at::kInt), weights_TK, context);
  EXPECT_TRUE(at::equal(kept_TK.squeeze(1), at::tensor({0, 1, 0, 1, 1, 0}).to(at::kBool)));
}

TEST(Capacity, factor_is_exact_whether_a_number_or_a_text) {
  moe::MoeOptions options = test::base_options();
  read_fields(Json::parse(R"({"capacity": {"factor": 1.1, "min_capacity": 0}})"), "moe", options);
  EXPECT_EQ(options.capacity.factor.text, "1.1");
  options.num_experts = 4;
  EXPECT_EQ(moe::expert_capacity(options, 100), 55);
  read_fields(Json::parse(R"({"capacity": {"factor": 2}})"), "moe", options);
  EXPECT_EQ(options.capacity.factor.text, "2");
  EXPECT_THROW(read_fields(Json::parse(R"({"capacity": {"factor": true}})"), "moe", options), ConfigError);
}

TEST(ForcedSkew, the_hottest_expert_has_the_load_that_was_asked_for) {
  moe::MoeOptions options = test::base_options();
  options.router.selection = moe::Selection::kForcedSkew;
  moe::TokenContext context;
  context.num_sequences = 1;
  context.sequence_length = 600;
  for (const double skew : {1.0, 2.0, 3.0}) {
    options.router.forced_skew = skew;
    const at::Tensor ids_N = moe::forced_ids(options, context).reshape({-1});
    EXPECT_EQ((ids_N == 0).sum().item<std::int64_t>(), static_cast<std::int64_t>(skew * 1200 / 6));
  }
}

// Also where K and E - 1 have a common factor, or hot tokens come as often as the others go round.
TEST(ForcedSkew, the_other_experts_share_the_rest_evenly) {
  for (const auto& [experts, top_k, skew] :
       {std::tuple{6, 2, 3.0}, std::tuple{4, 3, 1.0}, std::tuple{64, 6, 4.0}, std::tuple{7, 3, 7.0 / 3.0}}) {
    moe::MoeOptions options = test::base_options();
    options.num_experts = experts;
    options.top_k = top_k;
    options.router.selection = moe::Selection::kForcedSkew;
    options.router.forced_skew = skew;
    moe::TokenContext context;
    context.num_sequences = 1;
    context.sequence_length = 1000;
    const at::Tensor ids_TK = moe::forced_ids(options, context);
    const at::Tensor counts_E = at::bincount(ids_TK.reshape({-1}), {}, experts);
    const at::Tensor others = counts_E.narrow(0, 1, experts - 1);
    EXPECT_LE((others.max() - others.min()).item<std::int64_t>(), 1) << experts << " experts, top " << top_k;
    for (std::int64_t t = 0; t < 1000; ++t) {
      const auto* ids = ids_TK.const_data_ptr<std::int32_t>() + t * top_k;
      EXPECT_EQ(std::set<std::int32_t>(ids, ids + top_k).size(), static_cast<std::size_t>(top_k)) << t;
    }
  }
}

// Sinkhorn and, by default, capacity are for training alone: any number of sequences can be evaluated.
TEST(Groups, bind_evaluation_only_where_they_matter_there) {
  moe::MoeOptions options = test::base_options();
  options.capacity = {.drop_policy = moe::DropPolicy::kPosition, .group_sequences = 4};
  EXPECT_EQ(moe::indivisible_sequences(options, /*training=*/true), 4);
  EXPECT_EQ(moe::indivisible_sequences(options, /*training=*/false), 1);
  options.capacity.drop_in_evaluation = true;
  EXPECT_EQ(moe::indivisible_sequences(options, /*training=*/false), 4);
  const auto alone = [&] {
    try {
      moe::require_single_sequences(options, "inspect");
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_THAT(alone(), testing::StartsWith("inspect: takes one sequence, but with "
                                           "model.moe.capacity.drop_in_evaluation = true groups of "
                                           "capacity.group_sequences = 4"));
  options.capacity.drop_policy = moe::DropPolicy::kNone;
  options.router.selection = moe::Selection::kSinkhorn;
  EXPECT_EQ(moe::indivisible_sequences(options, /*training=*/true), 4);
  EXPECT_EQ(moe::indivisible_sequences(options, /*training=*/false), 1);
  EXPECT_EQ(alone(), "accepted");
  options.router.selection = moe::Selection::kExpertChoice;
  EXPECT_THAT(alone(), testing::HasSubstr("with model.moe.router.selection = \"expert_choice\" groups"));
}

TEST(Capacity, group_that_straddles_ranks_is_refused) {
  moe::MoeOptions options = test::base_options();
  options.capacity = {.drop_policy = moe::DropPolicy::kPosition, .group_sequences = 2};
  moe::TokenContext context;
  context.num_sequences = 3;
  context.sequence_length = 1;
  EXPECT_THROW(moe::kept_slots(options, at::zeros({3, 2}, at::kInt), at::zeros({3, 2}), context),
               ConfigError);
}

TEST(ExpertBias, follows_the_sign_of_the_exact_excess) {
  at::Tensor bias = at::zeros({4}, at::kFloat);
  const std::int64_t large = std::int64_t{1} << 40;  // a float would lose the difference of one
  moe::update_expert_bias(bias, at::tensor({large, large + 1, large - 1, large}, at::kLong), 0.25);
  EXPECT_TRUE(at::equal(bias, at::tensor({0.0F, -0.25F, 0.25F, 0.0F})));
}

// Experts that choose half a choice per token each time are balanced all the same.
TEST(BalanceLoss, normalised_balance_is_one_whatever_the_number_of_choices) {
  moe::MoeOptions options = test::base_options();
  moe::RouterStatistics statistics;
  statistics.num_tokens_B = at::full({1}, 12, at::kLong);
  statistics.choice_counts_BE = at::full({1, 6}, 1, at::kLong);
  statistics.first_counts_BE = at::zeros({1, 6}, at::kLong);
  statistics.prob_sums_BE = at::full({1, 6}, 2.0, at::kDouble);
  statistics.importance_BE = statistics.prob_sums_BE;
  statistics.squared_lse_B = at::zeros({1}, at::kDouble);
  statistics.entropy_B = at::zeros({1}, at::kDouble);
  for (const moe::LossScope scope : {moe::LossScope::kBatch, moe::LossScope::kSequence}) {
    options.balance = {.load_balance = 1.0, .load_balance_scope = scope};
    const moe::BalanceLoss loss = test::balance_of(options, statistics);
    EXPECT_DOUBLE_EQ(loss.normalized_balance, 1.0);
    EXPECT_DOUBLE_EQ(loss.terms.at("load_balance"), 1.0);
  }
}

// The values of a balanced and of a collapsed router, worked out by hand for E = 16, K = 4 (one layer).
TEST(BalanceLoss, known_values_when_balanced_and_collapsed) {
  moe::MoeOptions options = test::base_options();
  options.num_experts = 16;
  options.top_k = 4;
  options.balance = {.load_balance = 1, .gshard = 1, .hf_pooled = 1};
  moe::RouterStatistics balanced;
  balanced.num_tokens_B = at::full({1}, 64, at::kLong);
  balanced.choice_counts_BE = at::full({1, 16}, 16, at::kLong);
  balanced.first_counts_BE = at::full({1, 16}, 4, at::kLong);
  balanced.prob_sums_BE = at::full({1, 16}, 4.0, at::kDouble);
  balanced.squared_lse_B = at::zeros({1}, at::kDouble);
  moe::RouterStatistics collapsed = balanced;
  const at::Tensor first_four = (at::arange(16) < 4).unsqueeze(0);
  collapsed.choice_counts_BE = 64 * first_four.to(at::kLong);
  collapsed.prob_sums_BE = 16.0 * first_four.to(at::kDouble);
  const auto balance_of = [&](moe::RouterStatistics& statistics) {
    statistics.importance_BE = statistics.prob_sums_BE;
    statistics.entropy_B = at::zeros({1}, at::kDouble);
    const moe::RouterTotals totals(statistics);
    const std::vector<moe::LayerStatistics> layers = {{.local = statistics, .totals = totals}};
    return moe::balance_loss(options, layers);
  };
  const moe::BalanceLoss even = balance_of(balanced);
  EXPECT_DOUBLE_EQ(even.terms.at("load_balance"), 1.0);
  EXPECT_DOUBLE_EQ(even.terms.at("gshard"), 1.0 / 256);
  EXPECT_DOUBLE_EQ(even.terms.at("hf_pooled"), 4.0);
  EXPECT_DOUBLE_EQ(even.normalized_balance, 1.0);
  EXPECT_DOUBLE_EQ(balance_of(collapsed).terms.at("load_balance"), 4.0);
}

}  // namespace
}  // namespace collegium
