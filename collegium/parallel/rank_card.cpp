// SPDX-License-Identifier: Apache-2.0
#include "collegium/parallel/rank_card.h"

#include <fmt/ranges.h>

#include "collegium/base/units.h"
#include "collegium/model/parameters.h"
#include "collegium/parallel/shares.h"

namespace collegium::parallel {

namespace {

void count_parameters(const model::ModelConfig& config, RankCard& card) {
  const model::ExpertRange held{.first = card.first_expert, .count = card.num_experts};
  for (const model::Parameter& p : model::list_parameters(config, held)) {
    if (p.kind == model::ParameterKind::kBuffer) continue;
    (p.kind == model::ParameterKind::kExpert ? card.expert_parameters : card.dense_parameters) +=
        model::num_values(p);
  }
}

void count_bytes(std::int64_t bytes_per_value, RankCard& card) {
  const std::int64_t parameters = card.dense_parameters + card.expert_parameters;
  const std::int64_t master_bytes = bytes_per_value == 8 ? 8 : 4;
  const std::int64_t num_states = master_bytes == bytes_per_value ? 2 : 3;  // the value is its own master
  card.value_bytes = parameters * bytes_per_value;
  card.gradient_bytes = parameters * master_bytes;
  card.optimizer_bytes = parameters * master_bytes * num_states;
}

}  // namespace

std::vector<RankCard> make_rank_cards(const model::ModelConfig& config, const ParallelOptions& options,
                                      int num_ranks, std::int64_t micro_sequences,
                                      std::int64_t bytes_per_value) {
  const int ep = resolve_ep(options, num_ranks, config.moe.num_experts);
  const mesh::Mesh mesh({.pp = 1, .dp = num_ranks, .cp = 1, .tp = 1, .ep = ep, .etp = 1});
  const moe::ExpertPlacement placement{.num_experts = config.moe.num_experts, .num_ranks = ep};
  const std::int64_t unit = moe::indivisible_sequences(config.moe, /*training=*/true);
  std::vector<RankCard> cards;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const mesh::Coordinates place = mesh.coordinates(rank);
    const std::vector<int> ep_group = mesh.group({mesh::Axis::kEp}, rank);
    const std::vector<int> edp_group = mesh.group({mesh::Axis::kEdp}, rank);
    RankCard card{.rank = rank,
                  .dp = place.dp,
                  .edp = place.edp,
                  .ep = place.ep,
                  .ep_group = {ep_group.begin(), ep_group.end()},
                  .edp_group = {edp_group.begin(), edp_group.end()},
                  .first_expert = placement.first(place.ep),
                  .num_experts = placement.count(place.ep)};
    card.sequences = share_of(micro_sequences, unit, num_ranks, rank).count;
    count_parameters(config, card);
    count_bytes(bytes_per_value, card);
    cards.push_back(std::move(card));
  }
  return cards;
}

std::string rank_cards_text(const std::vector<RankCard>& cards, const model::ModelConfig& config,
                            const ParallelOptions& options) {
  const auto ep = static_cast<std::int64_t>(cards.front().ep_group.size());
  const auto edp = static_cast<std::int64_t>(cards.front().edp_group.size());
  std::string text = fmt::format(
      "dp = {0} ranks see different sequences; ep = {1} of them share the {3} experts of a layer{4}; "
      "edp = dp / ep = {2} {5} of every expert.\n"
      "Dense gradients are summed over all {0} ranks, an expert's over its edp group.\n\n",
      cards.size(), ep, edp, config.moe.num_experts,
      options.ep == 0 ? " (parallel.ep = 0: the largest divisor of the ranks up to the experts)" : "",
      edp == 1 ? "copy" : "copies");
  text +=
      fmt::format("{:>4} {:>4} {:>4} {:>4}  {:<16} {:<14} {:<12} {:>9} {:>9} {:>11} {:>11} {:>11} {:>5}\n",
                  "rank", "dp", "edp", "ep", "rows to/from", "same experts", "experts", "dense", "expert",
                  "weights", "gradients", "optimizer", "seqs");
  for (const RankCard& c : cards) {
    const std::string experts =
        c.num_experts == 1 ? fmt::format("{}", c.first_expert)
                           : fmt::format("{}-{}", c.first_expert, c.first_expert + c.num_experts - 1);
    text += fmt::format(
        "{:>4} {:>4} {:>4} {:>4}  {:<16} {:<14} {:<12} {:>9} {:>9} {:>11} {:>11} {:>11} {:>5}\n", c.rank,
        c.dp, c.edp, c.ep, fmt::format("{}", fmt::join(c.ep_group, ",")),
        fmt::format("{}", fmt::join(c.edp_group, ",")), experts,
        format_count(static_cast<double>(c.dense_parameters)),
        format_count(static_cast<double>(c.expert_parameters)),
        format_bytes(static_cast<double>(c.value_bytes)), format_bytes(static_cast<double>(c.gradient_bytes)),
        format_bytes(static_cast<double>(c.optimizer_bytes)), c.sequences);
  }
  return text;
}

}  // namespace collegium::parallel
