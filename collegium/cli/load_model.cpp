// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/load_model.h"

#include <filesystem>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/train/checkpoint.h"
#include "collegium/train/on_all_ranks.h"

namespace collegium::cli {

std::string find_model(const std::string& directory) {
  if (path_exists(std::filesystem::path(directory) / "config.json")) return directory;
  const auto newest = train::find_latest_checkpoint(directory);
  return newest ? newest->string() : directory;
}

LoadedModel load_model(const std::string& directory, const model::ModelConfig& config, at::ScalarType dtype,
                       const std::shared_ptr<comm::Communicator>& world) {
  // A run that goes on may have written another checkpoint while the ranks looked for the newest one.
  train::require_same_on_all_ranks(*world, directory,
                                   [](std::size_t rank, const Json& theirs, const Json& first) {
                                     return fmt::format("rank {} found {}, rank 0 {}: name a checkpoint",
                                                        rank, theirs.dump(), first.dump());
                                   });
  if (world->rank() == 0) train::warn_of_changed_weights(directory);
  parallel::ParallelOptions options;
  // The fewest exchanges: generation sends few tokens at a time.
  options.dispatcher.kind = moe::DispatcherKind::kUneven;
  parallel::Groups groups = parallel::make_groups(world, options, config.moe);
  model::Decoder decoder(config, model::load_parameters(directory, config, dtype, groups.held_experts()),
                         parallel::make_transport(groups, options));
  return {.groups = std::move(groups), .decoder = std::move(decoder)};
}

}  // namespace collegium::cli
