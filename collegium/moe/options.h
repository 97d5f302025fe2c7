// SPDX-License-Identifier: Apache-2.0
#pragma once

// Every choice of a Mixture-of-Experts layer, in one documented struct: router, capacity, balance losses,
// shared experts. Read from the run file's [model.moe.*] tables or from config.json's "collegium" object with
// read_fields().

#include <cstdint>
#include <string>

#include "collegium/base/fields.h"

namespace collegium::moe {

enum class ScoreFunction { kSoftmax, kSigmoid };
/// kScoreFirst: score all experts, then select K. kSelectFirst: select K logits, then score only those.
enum class ScoreOrder { kScoreFirst, kSelectFirst };
enum class Selection { kTopK, kSinkhorn, kExpertChoice, kForcedBalance, kForcedSkew };
enum class Noise {
  kNone,
  kJitterRouter,       ///< router input times U(1-eps, 1+eps); the experts see the clean input
  kJitterInput,        ///< the Hugging Face way: the jittered input goes to router and experts
  kNoisyTopK,          ///< learned Gaussian noise on the logits [Shazeer2017, Eqs 3-5]
  kGumbel,             ///< Gumbel(0, 1) added for the selection only; weights from clean scores
  kRandomSecondExpert  ///< GShard: the second expert is dispatched with probability min(1, 2 g2); needs top_k
                       ///< = 2
};
enum class GroupScore { kMax, kTopTwoSum, kTopSum };  ///< kTopSum: the sum of the top (K / top_groups) scores
enum class DropPolicy { kNone, kPosition, kProbability, kRandom };
/// Whether weights are renormalised over the K choices before or after dropping.
enum class Renormalize { kNever, kBeforeDrop, kAfterDrop };
enum class SharedExpert { kNone, kSum, kGated, kResidualMix };

struct RouterOptions {
  ScoreFunction score = ScoreFunction::kSoftmax;
  ScoreOrder order = ScoreOrder::kScoreFirst;
  Selection selection = Selection::kTopK;
  Renormalize renormalize = Renormalize::kBeforeDrop;
  double scaling_factor = 1.0;
  std::int64_t num_groups = 1;
  std::int64_t top_groups = 1;
  GroupScore group_score = GroupScore::kTopTwoSum;
  Noise noise = Noise::kNone;
  double jitter_epsilon = 0.01;
  std::int64_t sinkhorn_iterations = 8;
  DecimalText expert_choice_factor = "2";
  bool allow_non_causal = false;
  double forced_skew = 4.0;
  bool bias_balancing = false;
  double bias_update_rate = 1e-3;
};
template <class Fields>
void describe(Fields& fields, RouterOptions& o) {
  fields("score", o.score, "softmax or sigmoid of the router's logits");
  fields("order", o.order,
         "score_first: score all experts, select K; select_first: select K logits, score those");
  fields("selection", o.selection,
         "top_k; sinkhorn (balanced assignment in training); expert_choice; forced_balance and forced_skew "
         "(benchmarks)");
  fields(
      "renormalize", o.renormalize,
      "never, before_drop or after_drop: whether and when the K weights of a token are divided by their sum");
  fields("scaling_factor", o.scaling_factor, "factor on the weights, after renormalisation");
  fields("num_groups", o.num_groups,
         "experts are cut into this many equal groups (group-limited routing); 1 = off");
  fields("top_groups", o.top_groups, "a token may use experts of this many groups only");
  fields("group_score", o.group_score,
         "max, top_two_sum or top_sum (of the top K/top_groups) of the group's scores");
  fields("noise", o.noise,
         "none, jitter_router, jitter_input (Hugging Face), noisy_top_k (Shazeer, learned), gumbel, "
         "random_second_expert (GShard)");
  fields("jitter_epsilon", o.jitter_epsilon, "half width of the jitter's uniform factor");
  fields("sinkhorn_iterations", o.sinkhorn_iterations,
         "row/column normalisations of the Sinkhorn assignment");
  fields("expert_choice_factor", o.expert_choice_factor,
         "mean experts per token of expert choice, taken as an exact decimal number");
  fields("allow_non_causal", o.allow_non_causal,
         "permit expert choice in a causal model (it looks at future tokens)");
  fields("forced_skew", o.forced_skew,
         "forced_skew: load of the hottest expert over the mean load, at most num_experts / top_k");
  fields("bias_balancing", o.bias_balancing,
         "loss-free balancing: select by score + bias, bias updated once per step");
  fields("bias_update_rate", o.bias_update_rate, "step of the loss-free bias");
}

struct CapacityOptions {
  DropPolicy drop_policy = DropPolicy::kNone;
  DecimalText factor = "1.25";
  std::int64_t min_capacity = 4;
  std::int64_t group_sequences = 1;
  bool drop_in_evaluation = false;
};
template <class Fields>
void describe(Fields& fields, CapacityOptions& o) {
  fields("drop_policy", o.drop_policy,
         "none = dropless; position (all first choices before any second), probability or random: who is "
         "dropped over capacity");
  fields("factor", o.factor,
         "capacity factor, taken as an exact decimal number: capacity = max(ceil(S K / E factor), "
         "min_capacity)");
  fields("min_capacity", o.min_capacity, "smallest capacity of an expert, tokens per group");
  fields("group_sequences", o.group_sequences,
         "whole consecutive sequences that share one capacity (or one Sinkhorn or expert-choice assignment)");
  fields("drop_in_evaluation", o.drop_in_evaluation, "apply the capacity in evaluation and generation too");
}

enum class LossScope { kSequence, kBatch };
enum class ImportanceOf { kWeights, kProbabilities };

/// Coefficients of the balance losses; 0 switches a loss off. Each is computed per layer and averaged over
/// the layers.
struct BalanceOptions {
  double load_balance = 0.0;
  LossScope load_balance_scope = LossScope::kBatch;
  double gshard = 0.0;
  double switch_top1 = 0.0;
  double importance_cv2 = 0.0;
  ImportanceOf importance_of = ImportanceOf::kWeights;
  double load_cv2 = 0.0;
  double hf_pooled = 0.0;
  double z_loss = 0.0;
};
template <class Fields>
void describe(Fields& fields, BalanceOptions& o) {
  fields("load_balance", o.load_balance,
         "coefficient of E sum_e f_e P_e, f = counts/sum(counts); 1 when balanced");
  fields("load_balance_scope", o.load_balance_scope,
         "sequence: per sequence, then averaged; batch: all tokens of the micro-step over all data-parallel "
         "ranks");
  fields("gshard", o.gshard,
         "coefficient of l_aux = (1/E) sum_e (c_e/S) m_e, c_e = first choices before dropping, per sequence");
  fields("switch_top1", o.switch_top1,
         "coefficient of E sum_e f_e P_e with f from first choices only (Switch)");
  fields("importance_cv2", o.importance_cv2, "coefficient of CV^2 of the experts' importance");
  fields("importance_of", o.importance_of,
         "importance sums weights (of the K selected, Shazeer) or probabilities (of all experts) over the "
         "batch");
  fields("load_cv2", o.load_cv2,
         "coefficient of CV^2 of the smooth load (Shazeer; needs noise = noisy_top_k)");
  fields("hf_pooled", o.hf_pooled,
         "coefficient of Hugging Face's form, pooled over all layers before the product");
  fields("z_loss", o.z_loss, "coefficient of mean over tokens of logsumexp(logits)^2");
}

struct SharedExpertOptions {
  SharedExpert kind = SharedExpert::kNone;
  std::int64_t ffn_size = 0;
};
template <class Fields>
void describe(Fields& fields, SharedExpertOptions& o) {
  fields("kind", o.kind,
         "none; sum (DeepSeek); gated (sigmoid gate, Qwen2); residual_mix (softmax of two learned "
         "coefficients per token)");
  fields("ffn_size", o.ffn_size, "width of the shared expert");
}

struct MoeOptions {
  std::int64_t num_experts = 8;
  std::int64_t top_k = 2;
  std::int64_t ffn_size = 0;
  RouterOptions router;
  CapacityOptions capacity;
  BalanceOptions balance;
  SharedExpertOptions shared_expert;
};
template <class Fields>
void describe(Fields& fields, MoeOptions& o) {
  fields("num_experts", o.num_experts, "experts per layer (E)");
  fields("top_k", o.top_k, "experts per token (K)");
  fields("ffn_size", o.ffn_size, "width of one expert (F)");
  fields("router", o.router, "scores, selection and noise");
  fields("capacity", o.capacity, "capacity and dropping");
  fields("balance", o.balance, "balance losses");
  fields("shared_expert", o.shared_expert, "expert that every token takes");
}

/// What     Checks every rule between the options.
/// Throws   ConfigError naming field (prefixed by `path`), value, rule and the other number.
void validate(const MoeOptions& options, const std::string& path, bool causal, bool training);

/// What     Whether a token's experts are its K largest (noisy) logits, of all experts and unbiased: what the
///          smooth load is the probability of.
bool chooses_largest_logits(const MoeOptions& options);
/// What     Whether the tokens of a capacity group influence each other's experts, in training or in
///          evaluation: groups must then stay whole.
bool tokens_interact_in_groups(const MoeOptions& options, bool training);
/// What     Consecutive sequences that must stay on one rank: those of a group where its tokens influence
///          each other, else one.
std::int64_t indivisible_sequences(const MoeOptions& options, bool training);
/// What     Refuses to evaluate one sequence alone where it would be a part of a capacity group.
/// Throws   ConfigError: `what` takes one sequence, the option that makes groups, and their size.
void require_single_sequences(const MoeOptions& options, const std::string& what);

}  // namespace collegium::moe

namespace collegium {

template <>
struct EnumNames<moe::ScoreFunction> {
  static constexpr std::pair<std::string_view, moe::ScoreFunction> names[] = {
      {"softmax", moe::ScoreFunction::kSoftmax}, {"sigmoid", moe::ScoreFunction::kSigmoid}};
};
template <>
struct EnumNames<moe::ScoreOrder> {
  static constexpr std::pair<std::string_view, moe::ScoreOrder> names[] = {
      {"score_first", moe::ScoreOrder::kScoreFirst}, {"select_first", moe::ScoreOrder::kSelectFirst}};
};
template <>
struct EnumNames<moe::Selection> {
  static constexpr std::pair<std::string_view, moe::Selection> names[] = {
      {"top_k", moe::Selection::kTopK},
      {"sinkhorn", moe::Selection::kSinkhorn},
      {"expert_choice", moe::Selection::kExpertChoice},
      {"forced_balance", moe::Selection::kForcedBalance},
      {"forced_skew", moe::Selection::kForcedSkew}};
};
template <>
struct EnumNames<moe::Noise> {
  static constexpr std::pair<std::string_view, moe::Noise> names[] = {
      {"none", moe::Noise::kNone},
      {"jitter_router", moe::Noise::kJitterRouter},
      {"jitter_input", moe::Noise::kJitterInput},
      {"noisy_top_k", moe::Noise::kNoisyTopK},
      {"gumbel", moe::Noise::kGumbel},
      {"random_second_expert", moe::Noise::kRandomSecondExpert}};
};
template <>
struct EnumNames<moe::GroupScore> {
  static constexpr std::pair<std::string_view, moe::GroupScore> names[] = {
      {"max", moe::GroupScore::kMax},
      {"top_two_sum", moe::GroupScore::kTopTwoSum},
      {"top_sum", moe::GroupScore::kTopSum}};
};
template <>
struct EnumNames<moe::DropPolicy> {
  static constexpr std::pair<std::string_view, moe::DropPolicy> names[] = {
      {"none", moe::DropPolicy::kNone},
      {"position", moe::DropPolicy::kPosition},
      {"probability", moe::DropPolicy::kProbability},
      {"random", moe::DropPolicy::kRandom}};
};
template <>
struct EnumNames<moe::Renormalize> {
  static constexpr std::pair<std::string_view, moe::Renormalize> names[] = {
      {"never", moe::Renormalize::kNever},
      {"before_drop", moe::Renormalize::kBeforeDrop},
      {"after_drop", moe::Renormalize::kAfterDrop}};
};
template <>
struct EnumNames<moe::SharedExpert> {
  static constexpr std::pair<std::string_view, moe::SharedExpert> names[] = {
      {"none", moe::SharedExpert::kNone},
      {"sum", moe::SharedExpert::kSum},
      {"gated", moe::SharedExpert::kGated},
      {"residual_mix", moe::SharedExpert::kResidualMix}};
};
template <>
struct EnumNames<moe::LossScope> {
  static constexpr std::pair<std::string_view, moe::LossScope> names[] = {
      {"sequence", moe::LossScope::kSequence}, {"batch", moe::LossScope::kBatch}};
};
template <>
struct EnumNames<moe::ImportanceOf> {
  static constexpr std::pair<std::string_view, moe::ImportanceOf> names[] = {
      {"weights", moe::ImportanceOf::kWeights}, {"probabilities", moe::ImportanceOf::kProbabilities}};
};

}  // namespace collegium
