// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/load_model.h"

#include "collegium/model/checkpoint_io.h"

namespace collegium::cli {

LoadedModel load_model(const std::string& directory, const model::ModelConfig& config, at::ScalarType dtype,
                       const std::shared_ptr<comm::Communicator>& world) {
  const parallel::ParallelOptions options;
  parallel::Groups groups = parallel::make_groups(world, options, config.moe.num_experts);
  model::Decoder decoder(config, model::load_parameters(directory, config, dtype, groups.held_experts()),
                         parallel::make_transport(groups, options));
  return {.groups = std::move(groups), .decoder = std::move(decoder)};
}

}  // namespace collegium::cli
