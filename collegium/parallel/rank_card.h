// SPDX-License-Identifier: Apache-2.0
#pragma once

// What every rank of a run will hold and with whom it will talk, before anything is started.

#include <cstdint>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/mesh/mesh.h"
#include "collegium/model/config.h"
#include "collegium/parallel/options.h"

namespace collegium::parallel {

struct RankCard {
  std::int64_t rank = 0;
  std::int64_t dp = 0;  ///< coordinates
  std::int64_t edp = 0;
  std::int64_t ep = 0;
  std::vector<std::int64_t> ep_group;   ///< world ranks that share the experts of a layer
  std::vector<std::int64_t> edp_group;  ///< world ranks that hold the same experts
  std::int64_t first_expert = 0;
  std::int64_t num_experts = 0;
  std::int64_t dense_parameters = 0;
  std::int64_t expert_parameters = 0;
  std::int64_t value_bytes = 0;      ///< weights in the compute dtype
  std::int64_t gradient_bytes = 0;   ///< sums in the master dtype
  std::int64_t optimizer_bytes = 0;  ///< masters (where the dtypes differ) and two moments
  std::int64_t sequences = 0;        ///< of a full micro-step
};
template <class Fields>
void describe(Fields& fields, RankCard& c) {
  fields("rank", c.rank, "world rank");
  fields("dp", c.dp, "place among the ranks that see different sequences");
  fields("edp", c.edp, "which copy of the experts");
  fields("ep", c.ep, "which part of the experts");
  fields("ep_group", c.ep_group, "ranks that share the experts of a layer");
  fields("edp_group", c.edp_group, "ranks that hold the same experts");
  fields("first_expert", c.first_expert, "first expert held, of every layer");
  fields("num_experts", c.num_experts, "experts held, of every layer");
  fields("dense_parameters", c.dense_parameters, "parameters that every rank holds");
  fields("expert_parameters", c.expert_parameters, "parameters of the experts held");
  fields("value_bytes", c.value_bytes, "weights in the compute dtype");
  fields("gradient_bytes", c.gradient_bytes, "gradient sums");
  fields("optimizer_bytes", c.optimizer_bytes, "masters and moments");
  fields("sequences", c.sequences, "sequences of a full micro-step");
}

/// What     A card per rank, from the configuration alone: nothing is allocated or communicated.
/// Throws   ConfigError: ep does not fit the ranks or the experts.
std::vector<RankCard> make_rank_cards(const model::ModelConfig& config, const ParallelOptions& options,
                                      int num_ranks, std::int64_t micro_sequences,
                                      std::int64_t bytes_per_value);

/// What     The cards as a table, with the rules that made them.
std::string rank_cards_text(const std::vector<RankCard>& cards, const model::ModelConfig& config,
                            const ParallelOptions& options);

}  // namespace collegium::parallel
