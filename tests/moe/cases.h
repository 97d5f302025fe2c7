// SPDX-License-Identifier: Apache-2.0
#pragma once

// Every router, capacity and loss variant, by name: the tests of oracle, gradients and layouts run over all
// of them.

#include <functional>
#include <string>
#include <vector>

#include "collegium/moe/options.h"

namespace collegium::test {

struct MoeCase {
  std::string name;
  std::function<void(moe::MoeOptions&)> change;
};

inline moe::MoeOptions base_options() {
  moe::MoeOptions o;
  o.num_experts = 6;
  o.top_k = 2;
  o.ffn_size = 5;
  return o;
}

inline void drop(moe::MoeOptions& o, moe::DropPolicy policy, const char* factor) {
  o.capacity.drop_policy = policy;
  o.capacity.factor = factor;
  o.capacity.min_capacity = 1;
}

inline std::vector<MoeCase> moe_cases() {
  using namespace moe;
  return {
      {"plain", [](MoeOptions&) {}},
      {"never_renormalized", [](MoeOptions& o) { o.router.renormalize = Renormalize::kNever; }},
      {"scaled", [](MoeOptions& o) { o.router.scaling_factor = 2.5; }},
      {"select_first",
       [](MoeOptions& o) {
         o.router.order = ScoreOrder::kSelectFirst;
         o.router.renormalize = Renormalize::kNever;
       }},
      {"sigmoid", [](MoeOptions& o) { o.router.score = ScoreFunction::kSigmoid; }},
      {"sigmoid_bias",
       [](MoeOptions& o) {
         o.router.score = ScoreFunction::kSigmoid;
         o.router.bias_balancing = true;
       }},
      {"all_experts", [](MoeOptions& o) { o.top_k = 6; }},
      {"one_of_one",
       [](MoeOptions& o) {
         o.num_experts = 1;
         o.top_k = 1;
         o.router.renormalize = Renormalize::kNever;
       }},
      {"top_one",
       [](MoeOptions& o) {
         o.top_k = 1;
         o.router.renormalize = Renormalize::kNever;
       }},
      {"groups_max",
       [](MoeOptions& o) {
         o.router.num_groups = 3;
         o.router.top_groups = 2;
         o.router.group_score = GroupScore::kMax;
       }},
      {"groups_top_two",
       [](MoeOptions& o) {
         o.router.num_groups = 2;
         o.router.top_groups = 1;
       }},
      {"groups_top_sum",
       [](MoeOptions& o) {
         o.top_k = 4;
         o.router.num_groups = 3;
         o.router.top_groups = 2;
         o.router.group_score = GroupScore::kTopSum;
       }},
      {"jitter_router",
       [](MoeOptions& o) {
         o.router.noise = Noise::kJitterRouter;
         o.router.jitter_epsilon = 0.3;
       }},
      {"jitter_input",
       [](MoeOptions& o) {
         o.router.noise = Noise::kJitterInput;
         o.router.jitter_epsilon = 0.3;
       }},
      {"noisy_top_k",
       [](MoeOptions& o) {
         o.router.noise = Noise::kNoisyTopK;
         o.router.order = ScoreOrder::kSelectFirst;
         o.balance.load_cv2 = 0.4;
       }},
      {"gumbel", [](MoeOptions& o) { o.router.noise = Noise::kGumbel; }},
      {"random_second", [](MoeOptions& o) { o.router.noise = Noise::kRandomSecondExpert; }},
      {"random_second_after_drop",
       [](MoeOptions& o) {
         o.router.noise = Noise::kRandomSecondExpert;
         o.router.renormalize = Renormalize::kAfterDrop;
       }},
      {"sinkhorn", [](MoeOptions& o) { o.router.selection = Selection::kSinkhorn; }},
      {"expert_choice",
       [](MoeOptions& o) {
         o.router.selection = Selection::kExpertChoice;
         o.router.allow_non_causal = true;
         o.router.renormalize = Renormalize::kNever;
       }},
      {"forced_balance", [](MoeOptions& o) { o.router.selection = Selection::kForcedBalance; }},
      {"forced_skew",
       [](MoeOptions& o) {
         o.router.selection = Selection::kForcedSkew;
         o.router.forced_skew = 2.5;
       }},
      {"sinkhorn_groups",
       [](MoeOptions& o) {
         o.router.selection = Selection::kSinkhorn;
         o.router.num_groups = 3;
         o.router.top_groups = 2;
       }},
      {"sinkhorn_bias",
       [](MoeOptions& o) {
         o.router.selection = Selection::kSinkhorn;
         o.router.bias_balancing = true;
         o.capacity.group_sequences = 2;
       }},
      {"groups_bias_select_first",
       [](MoeOptions& o) {
         o.router.order = ScoreOrder::kSelectFirst;
         o.router.num_groups = 2;
         o.router.top_groups = 1;
         o.router.bias_balancing = true;
       }},
      {"width_one", [](MoeOptions& o) { o.ffn_size = 1; }},
      {"drop_position", [](MoeOptions& o) { drop(o, DropPolicy::kPosition, "0.7"); }},
      {"drop_probability", [](MoeOptions& o) { drop(o, DropPolicy::kProbability, "0.7"); }},
      {"drop_probability_groups",
       [](MoeOptions& o) {
         o.router.num_groups = 3;
         o.router.top_groups = 2;
         drop(o, DropPolicy::kProbability, "0.5");
       }},
      {"drop_random_second",
       [](MoeOptions& o) {
         o.router.noise = Noise::kRandomSecondExpert;
         drop(o, DropPolicy::kPosition, "0.5");
       }},
      {"drop_random_groups",
       [](MoeOptions& o) {
         drop(o, DropPolicy::kRandom, "0.5");
         o.capacity.group_sequences = 2;
       }},
      {"drop_then_renormalize",
       [](MoeOptions& o) {
         drop(o, DropPolicy::kPosition, "0.5");
         o.router.renormalize = Renormalize::kAfterDrop;
       }},
      {"nearly_everything_dropped",
       [](MoeOptions& o) {
         o.capacity.drop_policy = DropPolicy::kPosition;
         o.capacity.factor = "0.000001";
         o.capacity.min_capacity = 0;
       }},
      {"shared_sum", [](MoeOptions& o) { o.shared_expert = {.kind = SharedExpert::kSum, .ffn_size = 4}; }},
      {"shared_gated",
       [](MoeOptions& o) { o.shared_expert = {.kind = SharedExpert::kGated, .ffn_size = 4}; }},
      {"shared_mix",
       [](MoeOptions& o) { o.shared_expert = {.kind = SharedExpert::kResidualMix, .ffn_size = 4}; }},
      {"losses_sequence",
       [](MoeOptions& o) {
         o.balance = {
             .load_balance = 0.3, .load_balance_scope = LossScope::kSequence, .gshard = 0.7, .z_loss = 0.2};
       }},
      {"losses_batch",
       [](MoeOptions& o) { o.balance = {.load_balance = 0.3, .switch_top1 = 0.5, .importance_cv2 = 0.4}; }},
      {"importance_raw",
       [](MoeOptions& o) {
         o.router.renormalize = Renormalize::kNever;
         o.balance.importance_cv2 = 0.4;
       }},
      {"importance_after_drop",
       [](MoeOptions& o) {
         drop(o, DropPolicy::kPosition, "0.7");
         o.router.renormalize = Renormalize::kAfterDrop;
         o.balance.importance_cv2 = 0.4;
       }},
      {"losses_probability_importance",
       [](MoeOptions& o) {
         o.balance.importance_cv2 = 0.4;
         o.balance.importance_of = ImportanceOf::kProbabilities;
         o.balance.hf_pooled = 0.6;
       }},
      {"losses_sigmoid",
       [](MoeOptions& o) {
         o.router.score = ScoreFunction::kSigmoid;
         o.balance = {.load_balance = 0.3, .importance_cv2 = 0.4, .z_loss = 0.2};
       }},
  };
}

}  // namespace collegium::test
