// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/load_model.h"

#include <filesystem>

#include "collegium/model/checkpoint_io.h"
#include "collegium/train/checkpoint.h"

namespace collegium::cli {

std::string find_model(const std::string& directory) {
  if (std::filesystem::exists(std::filesystem::path(directory) / "config.json")) return directory;
  const auto newest = train::find_latest_checkpoint(directory);
  return newest ? newest->string() : directory;
}

LoadedModel load_model(const std::string& directory, const model::ModelConfig& config, at::ScalarType dtype,
                       const std::shared_ptr<comm::Communicator>& world) {
  const parallel::ParallelOptions options;
  parallel::Groups groups = parallel::make_groups(world, options, config.moe.num_experts);
  model::Decoder decoder(config, model::load_parameters(directory, config, dtype, groups.held_experts()),
                         parallel::make_transport(groups, options));
  return {.groups = std::move(groups), .decoder = std::move(decoder)};
}

}  // namespace collegium::cli
