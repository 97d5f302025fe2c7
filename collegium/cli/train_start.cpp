// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/train_start.h"

#include <fmt/format.h>

#include <filesystem>
#include <optional>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/log.h"
#include "collegium/train/on_all_ranks.h"

namespace collegium::cli {

namespace {

// What of a section must stay. Data may lie elsewhere: its checksum says whether it is the same.
Json compared(const Json& config, const std::string& name) {
  Json section = config.value(name, Json());
  if (!section.is_object()) return section;
  if (name == "data") section.erase("path");
  if (name != "train") return section;
  Json kept = Json::object();
  for (const char* key : {"seed", "dtype", "steps"}) kept[key] = section.value(key, Json());
  return kept;
}

// What a resumed run may not change: its losses would no longer be those of the uninterrupted one.
void require_same_run(const Json& saved, const Json& wanted, const std::filesystem::path& checkpoint) {
  const auto data_checksum = [](const Json& config) {
    return config.value(Json::json_pointer("/data/checksum"), Json()).dump();
  };
  require_config(
      data_checksum(saved) == data_checksum(wanted),
      "{} was made with other data than is in {} now (checksum of its description: {}, now {}); "
      "prepare the same again, start over with --fresh, or take its weights with --weights-only {}",
      checkpoint.string(), wanted["data"]["path"].dump(), data_checksum(saved), data_checksum(wanted),
      checkpoint.string());
  for (const char* name : {"model", "data", "batch", "optimizer", "schedule", "train"}) {
    const std::string difference =
        train::first_difference(compared(saved, name), compared(wanted, name), name);
    require_config(
        difference.empty(),
        "{} was made with {}; continue with the same, start over with --fresh, or take its weights "
        "with --weights-only {}",
        checkpoint.string(), difference, checkpoint.string());
  }
}

// A rank that sees another folder, or an older state of it, would go on from another step.
std::optional<std::filesystem::path> latest_of_all_ranks(const std::filesystem::path& folder,
                                                         comm::Communicator& world) {
  const auto latest = train::find_latest_checkpoint(folder);
  train::require_same_on_all_ranks(
      world, latest ? latest->string() : "no checkpoint",
      [&](std::size_t rank, const Json& theirs, const Json& first) {
        return fmt::format(
            "run_folder = {}: rank {} finds {} there, rank 0 {}; all ranks must see the same folder",
            folder.string(), rank, theirs.dump(), first.dump());
      });
  return latest;
}

void resume(const std::filesystem::path& folder, const TrainRequest& request, train::Trainer& trainer) {
  const auto latest = latest_of_all_ranks(folder, *trainer.groups().world);
  if (!request.weights_only.empty()) {
    require_config(!latest || request.fresh,
                   "{} holds checkpoints; leave --weights-only out to continue from the last one, or pass "
                   "--fresh to start over",
                   folder.string());
    trainer.resume(request.weights_only, /*weights_only=*/true);
    if (trainer.groups().is_root())
      log_info(fmt::format("starting from the weights of {}", request.weights_only));
  } else if (latest && !request.fresh) {
    require_same_run(train::saved_run_config(*latest), trainer.state().run_config, *latest);
    trainer.resume(*latest, /*weights_only=*/false);
    if (trainer.groups().is_root()) log_info(fmt::format("continuing from {}", latest->string()));
  }
}

void make_run_folder(const std::filesystem::path& folder) {
  std::error_code code;
  std::filesystem::create_directories(folder, code);
  if (code) throw Error(fmt::format("cannot create run_folder = {}: {}", folder.string(), code.message()));
}

}  // namespace

std::unique_ptr<FolderLock> start_or_resume(const train::RunConfig& config, const TrainRequest& request,
                                            train::Trainer& trainer) {
  const std::filesystem::path folder = config.run_folder;
  const bool root = trainer.groups().is_root();
  std::unique_ptr<FolderLock> lock;
  if (root && is_folder(folder)) lock = std::make_unique<FolderLock>(folder);
  resume(folder, request, trainer);
  if (!request.replay_routing.empty()) trainer.replay_routing(request.replay_routing, config.train.steps);
  trainer.groups().world->barrier();
  if (root) {
    make_run_folder(folder);
    if (!lock) lock = std::make_unique<FolderLock>(folder);
    train::remove_temporary_folders(folder);
  }
  if (!request.record_routing.empty()) trainer.record_routing(request.record_routing);
  return lock;
}

}  // namespace collegium::cli
