// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/options.h"

#include "collegium/base/error.h"
#include "collegium/moe/capacity.h"

namespace collegium::moe {

namespace {

constexpr std::int64_t kMaxWidth = std::int64_t{1} << 31;

void validate_sizes(const MoeOptions& o, const std::string& path) {
  constexpr std::int64_t kMaxExperts = std::int64_t{1} << 20;
  require_config(o.num_experts >= 1, "{}.num_experts = {}: must be at least 1", path, o.num_experts);
  require_config(o.num_experts <= kMaxExperts, "{}.num_experts = {}: must be at most {}", path, o.num_experts,
                 kMaxExperts);
  require_config(o.top_k >= 1 && o.top_k <= o.num_experts,
                 "{}.top_k = {}: must lie between 1 and num_experts = {}", path, o.top_k, o.num_experts);
  require_config(o.ffn_size >= 1, "{}.ffn_size = {}: must be at least 1", path, o.ffn_size);
  require_config(o.ffn_size < kMaxWidth, "{}.ffn_size = {}: must be below 2^31", path, o.ffn_size);
  const SharedExpertOptions& shared = o.shared_expert;
  require_config(shared.kind == SharedExpert::kNone || shared.ffn_size >= 1,
                 "{}.shared_expert.ffn_size = {}: must be at least 1 for kind = \"{}\"", path,
                 shared.ffn_size, enum_name(shared.kind));
  require_config(shared.kind != SharedExpert::kNone || shared.ffn_size == 0,
                 "{}.shared_expert.ffn_size = {}: has no effect with kind = \"none\"", path, shared.ffn_size);
  require_config(shared.ffn_size < kMaxWidth, "{}.shared_expert.ffn_size = {}: must be below 2^31", path,
                 shared.ffn_size);
}

void validate_groups(const MoeOptions& o, const std::string& path) {
  const RouterOptions& r = o.router;
  require_config(r.num_groups >= 1 && o.num_experts % r.num_groups == 0,
                 "{}.router.num_groups = {}: must divide num_experts = {}", path, r.num_groups,
                 o.num_experts);
  require_config(r.top_groups >= 1 && r.top_groups <= r.num_groups,
                 "{}.router.top_groups = {}: must lie between 1 and num_groups = {}", path, r.top_groups,
                 r.num_groups);
  const std::int64_t reachable = r.top_groups * (o.num_experts / r.num_groups);
  require_config(o.top_k <= reachable, "{}.top_k = {}: {} groups of {} experts hold only {}", path, o.top_k,
                 r.top_groups, o.num_experts / r.num_groups, reachable);
}

void validate_router(const MoeOptions& o, const std::string& path, bool causal, bool training) {
  const RouterOptions& r = o.router;
  require_config(r.scaling_factor > 0.0, "{}.router.scaling_factor = {}: must be positive", path,
                 r.scaling_factor);
  require_config(r.jitter_epsilon >= 0.0 && r.jitter_epsilon < 1.0,
                 "{}.router.jitter_epsilon = {}: must lie in [0, 1)", path, r.jitter_epsilon);
  require_config(r.sinkhorn_iterations >= 1, "{}.router.sinkhorn_iterations = {}: must be at least 1", path,
                 r.sinkhorn_iterations);
  require_config(r.forced_skew >= 1.0, "{}.router.forced_skew = {}: must be at least 1 (1 = balanced)", path,
                 r.forced_skew);
  // One expert takes a token at most once, so its share of the choices is at most 1 / K.
  const double largest_skew = static_cast<double>(o.num_experts) / static_cast<double>(o.top_k);
  require_config(r.selection != Selection::kForcedSkew || r.forced_skew <= largest_skew,
                 "{}.router.forced_skew = {}: must be at most num_experts / top_k = {}", path, r.forced_skew,
                 largest_skew);
  require_config(r.bias_update_rate >= 0.0, "{}.router.bias_update_rate = {}: must not be negative", path,
                 r.bias_update_rate);
  require_config(r.noise != Noise::kRandomSecondExpert || o.top_k == 2,
                 "{}.router.noise = \"random_second_expert\": needs top_k = 2, not {}", path, o.top_k);
  require_config(r.noise != Noise::kGumbel || !r.bias_balancing,
                 "{}.router.noise = \"gumbel\": cannot be combined with bias_balancing = true", path);
  if (r.selection == Selection::kExpertChoice) {
    require_config(
        !causal || r.allow_non_causal,
        "{}.router.selection = \"expert_choice\": looks at future tokens, so a causal model refuses it; set "
        "allow_non_causal = true to do it all the same",
        path);
    require_config(
        r.order == ScoreOrder::kScoreFirst && r.renormalize == Renormalize::kNever,
        "{}.router.selection = \"expert_choice\": needs order = \"score_first\" and renormalize = \"never\"",
        path);
  }
  parse_decimal(r.expert_choice_factor.text, path + ".router.expert_choice_factor");
  const bool constant_weight = r.renormalize != Renormalize::kNever ||
                               (r.order == ScoreOrder::kSelectFirst && r.score == ScoreFunction::kSoftmax);
  require_config(!training || o.top_k > 1 || !constant_weight,
                 "{}.top_k = 1 with renormalised weights: the weight is always 1 and the router's gradient "
                 "is exactly zero; "
                 "set router.renormalize = \"never\" and router.order = \"score_first\" to train",
                 path);
}

// What the experts' own choice, a balanced assignment and a forced one would pass over without a word.
void validate_selection(const MoeOptions& o, const std::string& path) {
  const RouterOptions& r = o.router;
  const auto refuse = [&](bool combined, std::string_view with) {
    require_config(!combined, "{}.router.selection = \"{}\": cannot be combined with {}", path,
                   enum_name(r.selection), with);
  };
  const bool by_experts = r.selection == Selection::kExpertChoice;
  const bool forced = r.selection == Selection::kForcedBalance || r.selection == Selection::kForcedSkew;
  refuse((by_experts || forced || r.selection == Selection::kSinkhorn) && r.noise == Noise::kGumbel,
         "router.noise = \"gumbel\"");
  refuse(by_experts && r.noise == Noise::kRandomSecondExpert, "router.noise = \"random_second_expert\"");
  refuse((by_experts || forced) && r.bias_balancing, "router.bias_balancing = true");
  refuse((by_experts || forced) && r.num_groups > 1, "router.num_groups above 1");
  refuse(by_experts && o.capacity.drop_policy != DropPolicy::kNone,
         "capacity.drop_policy: its capacity is full");
  refuse(by_experts && o.balance.gshard > 0.0, "balance.gshard: no choice of a token is its first");
  refuse(by_experts && o.balance.switch_top1 > 0.0, "balance.switch_top1: no choice of a token is its first");
}

void validate_losses(const MoeOptions& o, const std::string& path) {
  BalanceOptions b = o.balance;
  const auto not_negative = [&path](const char* name, auto& value, const char* /*doc*/) {
    if constexpr (std::is_same_v<std::remove_reference_t<decltype(value)>, double>)
      require_config(value >= 0.0, "{}.balance.{} = {}: must not be negative", path, name, value);
  };
  describe(not_negative, b);
  require_config(b.load_cv2 == 0.0 || o.router.noise == Noise::kNoisyTopK,
                 "{}.balance.load_cv2 = {}: the smooth load needs router.noise = \"noisy_top_k\", not \"{}\"",
                 path, b.load_cv2, enum_name(o.router.noise));
  require_config(b.load_cv2 == 0.0 || chooses_largest_logits(o),
                 "{}.balance.load_cv2 = {}: the smooth load is that of router.selection = \"top_k\" without "
                 "bias_balancing, over all groups",
                 path, b.load_cv2);
}

}  // namespace

bool chooses_largest_logits(const MoeOptions& options) {
  const RouterOptions& r = options.router;
  return r.selection == Selection::kTopK && !r.bias_balancing && r.top_groups == r.num_groups;
}

bool tokens_interact_in_groups(const MoeOptions& options, bool training) {
  const CapacityOptions& capacity = options.capacity;
  const bool drops = capacity.drop_policy != DropPolicy::kNone && (training || capacity.drop_in_evaluation);
  return drops || (training && options.router.selection == Selection::kSinkhorn) ||
         options.router.selection == Selection::kExpertChoice;
}

std::int64_t indivisible_sequences(const MoeOptions& options, bool training) {
  return tokens_interact_in_groups(options, training) ? options.capacity.group_sequences : 1;
}

void require_single_sequences(const MoeOptions& options, const std::string& what) {
  const bool by_experts = options.router.selection == Selection::kExpertChoice;
  require_config(
      indivisible_sequences(options, /*training=*/false) == 1,
      "{}: takes one sequence, but with model.moe.{} groups of capacity.group_sequences = {} belong "
      "together",
      what, by_experts ? "router.selection = \"expert_choice\"" : "capacity.drop_in_evaluation = true",
      options.capacity.group_sequences);
}

void validate(const MoeOptions& options, const std::string& path, bool causal, bool training) {
  validate_sizes(options, path);
  validate_groups(options, path);
  validate_router(options, path, causal, training);
  validate_selection(options, path);
  validate_losses(options, path);
  const CapacityOptions& capacity = options.capacity;
  parse_decimal(capacity.factor.text, path + ".capacity.factor");
  constexpr std::int64_t kMostPlaces = std::int64_t{1} << 31;
  require_config(capacity.min_capacity >= 0 && capacity.min_capacity <= kMostPlaces,
                 "{}.capacity.min_capacity = {}: must lie between 0 and 2^31", path, capacity.min_capacity);
  require_config(capacity.group_sequences >= 1 && capacity.group_sequences <= kMostPlaces,
                 "{}.capacity.group_sequences = {}: must lie between 1 and 2^31", path,
                 capacity.group_sequences);
  require_config(
      options.router.renormalize != Renormalize::kAfterDrop || capacity.drop_policy != DropPolicy::kNone ||
          options.router.noise == Noise::kRandomSecondExpert,
      "{}.router.renormalize = \"after_drop\": nothing is dropped with capacity.drop_policy = \"none\"",
      path);
}

}  // namespace collegium::moe
