// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/load_model.h"

#include <filesystem>

#include "collegium/base/error.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/train/checkpoint.h"
#include "collegium/train/on_all_ranks.h"

namespace collegium::cli {

std::string find_model(const std::string& directory) {
  if (std::filesystem::exists(std::filesystem::path(directory) / "config.json")) return directory;
  const auto newest = train::find_latest_checkpoint(directory);
  return newest ? newest->string() : directory;
}

LoadedModel load_model(const std::string& directory, const model::ModelConfig& config, at::ScalarType dtype,
                       const std::shared_ptr<comm::Communicator>& world) {
  // A run that goes on may have written another checkpoint while the ranks looked for the newest one.
  const std::vector<Json> found = train::on_all_ranks(*world, [&] { return Json(directory); });
  for (std::size_t rank = 1; rank < found.size(); ++rank) {
    require_config(found[rank] == found[0], "rank {} found {}, rank 0 {}: name a checkpoint", rank,
                   found[rank].dump(), found[0].dump());
  }
  parallel::ParallelOptions options;
  // The fewest exchanges: generation sends few tokens at a time.
  options.dispatcher.kind = moe::DispatcherKind::kUneven;
  parallel::Groups groups = parallel::make_groups(world, options, config.moe);
  model::Decoder decoder(config, model::load_parameters(directory, config, dtype, groups.held_experts()),
                         parallel::make_transport(groups, options));
  return {.groups = std::move(groups), .decoder = std::move(decoder)};
}

}  // namespace collegium::cli
