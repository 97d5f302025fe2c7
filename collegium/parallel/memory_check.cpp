// SPDX-License-Identifier: Apache-2.0
#include "collegium/parallel/memory_check.h"

#include "collegium/base/error.h"
#include "collegium/base/machine.h"
#include "collegium/base/units.h"
#include "collegium/model/parameters.h"

namespace collegium::parallel {

namespace {

// In floating point: a mistyped size may not fit into 64 bits.
double count_values(const model::ModelConfig& config, const model::ExpertRange& held) {
  double total = 0.0;
  for (const model::Parameter& parameter : model::list_parameters(config, held)) {
    double count = 1.0;
    for (const std::int64_t size : parameter.shape) count *= static_cast<double>(size);
    total += count;
  }
  return total;
}

}  // namespace

void require_memory(const model::ModelConfig& config, const Groups& groups, std::int64_t bytes_per_value,
                    std::int64_t micro_tokens) {
  const double master_bytes = bytes_per_value == 8 ? 8.0 : 4.0;
  const auto value_bytes = static_cast<double>(bytes_per_value);
  // Gradient and two moments; the value is its own master where the dtypes agree.
  const double bytes_of_one =
      value_bytes + 3.0 * master_bytes + (master_bytes == value_bytes ? 0.0 : master_bytes);
  double state = 0.0;
  int num_ranks = 0;
  for (int rank = 0; rank < groups.world->size(); ++rank) {
    if (groups.world->node(rank) != groups.world->node(groups.world_rank())) continue;
    const int ep = groups.mesh.coordinates(rank).ep;
    state += bytes_of_one *
             count_values(config, {.first = groups.placement.first(ep), .count = groups.placement.count(ep)});
    ++num_ranks;
  }
  constexpr double kIdBytes = 3 * 8.0;  // token, target and document of an input
  const double token_bytes = kIdBytes + value_bytes * static_cast<double>(config.num_layers) *
                                            static_cast<double>(config.hidden_size);
  const double activations =
      token_bytes * static_cast<double>(micro_tokens) * num_ranks / static_cast<double>(groups.world->size());
  const double memory = machine_memory_bytes();
  require_config(
      state + activations <= memory,
      "the run needs {} for weights, gradients and optimizer state and at least {} for activations of "
      "the {} on this machine, which has {}; make the model or batch.micro_sequences smaller, or use "
      "more machines",
      format_bytes(state), format_bytes(activations),
      num_ranks == 1 ? std::string("rank") : fmt::format("{} ranks", num_ranks), format_bytes(memory));
}

}  // namespace collegium::parallel
