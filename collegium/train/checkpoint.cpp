// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/checkpoint.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/isfinite.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/base/log.h"
#include "collegium/base/text.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/model/tensor_io.h"
#include "collegium/train/on_all_ranks.h"
#include "collegium/train/optimizer_files.h"

namespace collegium::train {

namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "training/manifest.json";
constexpr const char* kState = "training/state.json";
constexpr const char* kOptimizerPrefix = "training/optimizer";
constexpr int kVersion = 1;  // of what is in training/

// The step of a folder called step-N; nothing for other names, and for numbers that no step has.
std::optional<std::int64_t> step_of(const std::string& name) {
  if (!name.starts_with("step-") || name.size() == 5) return std::nullopt;
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data() + 5, name.data() + name.size(), step);
  if (error != std::errc() || end != name.data() + name.size() || name[5] == '-') return std::nullopt;
  return step;
}

// What is in a folder; nothing when there is none.
std::vector<fs::path> list_folder(const fs::path& folder) {
  std::vector<fs::path> paths;
  std::error_code code;
  if (!fs::is_directory(folder, code)) return paths;
  for (fs::directory_iterator entry(folder, code), end; !code && entry != end; entry.increment(code))
    paths.push_back(entry->path());
  require_config(!code, "cannot read run folder {}: {}", folder.string(), code.message());
  return paths;
}

// Committed checkpoints, oldest first.
std::vector<fs::path> list_checkpoints(const fs::path& run_folder) {
  std::vector<std::pair<std::int64_t, fs::path>> found;
  for (const fs::path& path : list_folder(run_folder)) {
    const auto step = step_of(path.filename().string());
    std::error_code unreadable;
    if (step && fs::exists(path / kManifest, unreadable)) found.emplace_back(*step, path);
  }
  std::sort(found.begin(), found.end());
  std::vector<fs::path> checkpoints;
  for (auto& [step, path] : found) checkpoints.push_back(std::move(path));
  return checkpoints;
}

// Name -> size and checksum of every other file of a checkpoint.
Json manifest_files(const fs::path& checkpoint) {
  require_config(path_exists(checkpoint / kManifest), "{}: not a committed checkpoint ({} is missing)",
                 checkpoint.string(), kManifest);
  const Json manifest = read_json_file(checkpoint / kManifest);
  require_config(manifest.is_object() && manifest.contains("files") && manifest["files"].is_object(),
                 "{}: {} lists no files", checkpoint.string(), kManifest);
  const Json version = manifest.value("version", Json());
  require_config(version == kVersion, "{}: {}: version = {}: this program reads version {}",
                 checkpoint.string(), kManifest, version.dump(), kVersion);
  return manifest["files"];
}

struct ListedFile {
  std::uintmax_t bytes = 0;
  std::string xxh3;
};

// The manifest's entry of a file.
ListedFile listed_file(const fs::path& checkpoint, const std::string& name, const Json& entry) {
  const bool whole = entry.is_object() && entry.contains("bytes") && entry["bytes"].is_number_unsigned() &&
                     entry.contains("xxh3") && entry["xxh3"].is_string();
  require_config(whole, "{}: {} has no size and checksum of {}", checkpoint.string(), kManifest, name);
  return {.bytes = entry["bytes"].get<std::uintmax_t>(), .xxh3 = entry["xxh3"].get<std::string>()};
}

void require_finite(const optim::MasterWeights& masters) {
  for (const optim::Slot& slot : masters.slots()) {
    if (!at::isfinite(slot.master).all().item<bool>()) {
      throw Error(fmt::format("parameter {} is not finite: no checkpoint is written", slot.name));
    }
  }
}

void remove_checkpoint(const fs::path& folder) {
  // Half removed, it is called a temporary folder, which the next run removes.
  const fs::path aside = folder.string() + ".tmp-removed";
  try {
    fs::remove_all(aside);
    fs::rename(folder, aside);
    sync_folder(folder.parent_path());
    fs::remove_all(aside);
  } catch (const fs::filesystem_error& error) {
    throw Error(fmt::format("cannot remove checkpoint {}: {}", folder.string(), error.code().message()));
  }
}

void prune(const fs::path& run_folder, std::int64_t keep_last) {
  if (keep_last == 0) return;
  std::vector<fs::path> checkpoints = list_checkpoints(run_folder);
  const auto keep = static_cast<std::size_t>(keep_last);
  for (std::size_t i = 0; i + keep < checkpoints.size(); ++i) remove_checkpoint(checkpoints[i]);
}

// The manifest's entry of a file that was written.
void list_file(const fs::path& folder, const std::string& name, Json& files) {
  files[name] = {{"bytes", fs::file_size(folder / name)}, {"xxh3", checksum_file(folder / name)}};
}

// World rank 0 and its peers of the first copy of the experts write; that makes every tensor written once.
model::ModelShare share_of(const parallel::Groups& groups) {
  return {.experts = groups.place.edp == 0, .others = groups.is_root()};
}

// One checkpoint being written by all ranks of `groups`.
class CheckpointWriter {
 public:
  CheckpointWriter(fs::path run_folder, const model::Decoder& decoder, const optim::MasterWeights& masters,
                   const TrainingState& state, const parallel::Groups& groups)
      : run_folder_(std::move(run_folder)),
        final_(run_folder_ / fmt::format("step-{:08}", state.step)),
        decoder_(decoder),
        masters_(masters),
        state_(state),
        groups_(groups),
        shards_(
            decoder.config(), decoder.parameters(), [](const model::Parameter& p) { return p.value; },
            share_of(groups)) {}

  const fs::path& final_path() const { return final_; }

  // Agrees on the temporary folder and on every shard's number.
  void prepare() {
    if (groups_.is_root()) temporary_ = final_.string() + fmt::format(".tmp-{}", ::getpid());
    const std::vector<Json> plans = together([&] {
      require_finite(masters_);
      if (groups_.is_root()) {
        fs::remove_all(temporary_);
        fs::create_directories(temporary_ / "training");
      }
      return Json{{"shards", shards_.num_shards()}, {"folder", temporary_.filename().string()}};
    });
    temporary_ = run_folder_ / plans[0]["folder"].get<std::string>();
    for (std::size_t rank = 0; rank < plans.size(); ++rank) {
      const auto count = plans[rank]["shards"].get<std::int64_t>();
      if (static_cast<int>(rank) < groups_.world_rank()) first_shard_ += count;
      total_shards_ += count;
    }
  }

  // Every writer writes and checksums its own files.
  void write_parts() {
    const std::vector<Json> parts = together([&] {
      Json files = Json::object();
      const model::WeightIndex index = shards_.write(temporary_, first_shard_, total_shards_);
      for (const auto& [tensor, name] : index.file_of) {
        if (!files.contains(name)) list_file(temporary_, name, files);
      }
      const auto entries = optimizer_entries(masters_, share_of(groups_));
      if (!entries.empty()) {
        const std::string name = fmt::format("{}-{:05}.safetensors", kOptimizerPrefix, groups_.place.ep);
        model::write_tensors(temporary_ / name, entries);
        list_file(temporary_, name, files);
      }
      return Json{{"files", files}, {"file_of", index.file_of}, {"bytes", index.total_bytes}};
    });
    for (const Json& part : parts) {
      files_.update(part["files"]);
      index_.add({.file_of = part["file_of"].get<std::map<std::string, std::string>>(),
                  .total_bytes = part["bytes"].get<std::int64_t>()});
    }
  }

  // The rest, by rank 0, when all parts are there. The manifest is last.
  void commit(const std::vector<CompanionFile>& companions, std::int64_t keep_last) {
    together([&] {
      if (!groups_.is_root()) return Json();
      const std::vector<std::string> description =
          model::write_model_description(temporary_, decoder_.config(), decoder_.dtype(), index_);
      for (const std::string& name : description) list_file(temporary_, name, files_);
      for (const CompanionFile& file : companions) add_file(file.name, file.content);
      add_file(kState, state_json().dump(1));
      write_file_atomically(temporary_ / kManifest, Json{{"version", kVersion}, {"files", files_}}.dump(1));
      replace_folder(temporary_, final_);
      return Json();
    });
    // The checkpoint is there, whatever becomes of older ones.
    on_all_ranks(*groups_.world, [&] {
      if (groups_.is_root()) prune(run_folder_, keep_last);
      return Json();
    });
  }

  void discard() {
    std::error_code ignored;
    if (groups_.is_root()) fs::remove_all(temporary_, ignored);
  }

 private:
  std::vector<Json> together(const std::function<Json()>& part) {
    return on_all_ranks(*groups_.world, [&] {
      try {
        return part();
      } catch (const fs::filesystem_error& error) {
        throw Error(fmt::format("cannot write checkpoint {}: {}", final_.string(), error.code().message()));
      }
    });
  }

  void add_file(const std::string& name, const std::string& content) {
    write_file_atomically(temporary_ / name, content);
    list_file(temporary_, name, files_);
  }

  Json state_json() const {
    return {{"step", state_.step},
            {"samples", state_.samples},
            {"tokens", state_.tokens},
            {"elapsed_seconds", state_.elapsed_seconds},
            {"run_config", state_.run_config}};
  }

  fs::path run_folder_;
  fs::path final_;
  fs::path temporary_;
  const model::Decoder& decoder_;
  const optim::MasterWeights& masters_;
  const TrainingState& state_;
  const parallel::Groups& groups_;
  model::ShardWriter shards_;
  std::int64_t first_shard_ = 1;
  std::int64_t total_shards_ = 0;
  Json files_ = Json::object();  // the manifest's
  model::WeightIndex index_;
};

void verify_file(const fs::path& checkpoint, const std::string& name, const Json& entry) {
  const fs::path path = checkpoint / name;
  require_config(path_exists(path), "{}: {} is missing", checkpoint.string(), name);
  const ListedFile listed = listed_file(checkpoint, name, entry);
  require_config(fs::file_size(path) == listed.bytes, "{}: {} has {} bytes, the manifest says {}",
                 checkpoint.string(), name, fs::file_size(path), listed.bytes);
  const std::string sum = checksum_file(path);
  require_config(
      sum == listed.xxh3,
      "{}: {} is damaged or was changed: checksum {}, the manifest says {}; if it was edited, start "
      "from its weights alone with --weights-only; if it is damaged, remove the folder: the run then "
      "continues from the checkpoint before",
      checkpoint.string(), name, sum, listed.xxh3);
}

// Files number `first`, first + stride, ... of the manifest against what is there.
void verify_files(const fs::path& checkpoint, std::size_t first, std::size_t stride) {
  const Json files = manifest_files(checkpoint);
  std::size_t number = 0;
  for (const auto& [name, entry] : files.items()) {
    if (number++ % stride == first) verify_file(checkpoint, name, entry);
  }
}

std::vector<fs::path> optimizer_paths(const fs::path& checkpoint) {
  std::vector<fs::path> paths;
  const Json files = manifest_files(checkpoint);
  for (const auto& [name, entry] : files.items()) {
    if (name.starts_with(kOptimizerPrefix)) paths.push_back(checkpoint / name);
  }
  return paths;
}

TrainingState read_state(const fs::path& checkpoint) {
  const Json json = read_json_file(checkpoint / kState);
  try {
    return {.step = json.at("step").get<std::int64_t>(),
            .samples = json.at("samples").get<std::int64_t>(),
            .tokens = json.at("tokens").get<std::int64_t>(),
            .elapsed_seconds = json.at("elapsed_seconds").get<double>(),
            .run_config = json.at("run_config")};
  } catch (const Json::exception& error) {
    throw ConfigError(fmt::format("{}: {} lacks a part, or one is of another type: {}", checkpoint.string(),
                                  kState, error.what()));
  }
}

}  // namespace

fs::path save_checkpoint(const fs::path& run_folder, const model::Decoder& decoder,
                         const optim::MasterWeights& masters, const TrainingState& state,
                         const std::vector<CompanionFile>& companions, std::int64_t keep_last,
                         const parallel::Groups& groups) {
  const comm::WhereScope where(groups.world->where(),
                               {.step = state.step, .layer = -1, .phase = "checkpoint"});
  CheckpointWriter writer(run_folder, decoder, masters, state, groups);
  try {
    writer.prepare();
    writer.write_parts();
    writer.commit(companions, keep_last);
  } catch (...) {
    writer.discard();
    throw;
  }
  return writer.final_path();
}

std::optional<fs::path> find_latest_checkpoint(const fs::path& run_folder) {
  const std::vector<fs::path> checkpoints = list_checkpoints(run_folder);
  return checkpoints.empty() ? std::nullopt : std::optional(checkpoints.back());
}

void remove_temporary_folders(const fs::path& run_folder) {
  for (const fs::path& path : list_folder(run_folder)) {
    const std::string name = path.filename().string();
    if (!name.starts_with("step-") || !contains(name, ".tmp-")) continue;
    // Where names cannot be exchanged (NFS), a kill may leave a checkpoint that made room, and nothing yet in
    // its place.
    const fs::path final_path = run_folder / name.substr(0, name.find(".tmp-"));
    if (name.ends_with("-replaced") && !path_exists(final_path)) {
      fs::rename(path, final_path);
    } else {
      fs::remove_all(path);
    }
  }
}

void remove_checkpoints(const fs::path& run_folder) {
  remove_temporary_folders(run_folder);
  for (const fs::path& path : list_folder(run_folder)) {
    if (step_of(path.filename().string())) remove_checkpoint(path);
  }
}

void warn_of_changed_weights(const fs::path& directory) {
  if (!path_exists(directory / kManifest)) return;
  const Json files = manifest_files(directory);
  for (const auto& [name, entry] : files.items()) {
    const fs::path path = directory / name;
    if (fs::path(name).has_parent_path() || path.extension() != ".safetensors" || !is_file(path)) continue;
    if (listed_file(directory, name, entry).xxh3 == checksum_file(path)) continue;
    log_warning(
        fmt::format("{} is not the file that training wrote: it was edited, or is damaged", path.string()));
  }
}

void verify_checkpoint(const fs::path& checkpoint) { verify_files(checkpoint, 0, 1); }

Json saved_run_config(const fs::path& checkpoint) {
  const Json files = manifest_files(checkpoint);
  verify_file(checkpoint, kState, files.value(kState, Json()));
  Json config = read_state(checkpoint).run_config;
  require_config(config.is_object(), "{}: {} holds no run configuration", checkpoint.string(), kState);
  return config;
}

TrainingState load_checkpoint(const fs::path& checkpoint, model::Decoder& decoder,
                              optim::MasterWeights& masters, const parallel::Groups& groups) {
  const comm::WhereScope where(groups.world->where(), {.step = -1, .layer = -1, .phase = "resume"});
  verify_files(checkpoint, static_cast<std::size_t>(groups.world_rank()),
               static_cast<std::size_t>(groups.world->size()));
  groups.world->barrier();
  const at::NoGradGuard no_grad;
  const std::vector<model::Parameter> weights =
      model::load_parameters(checkpoint, decoder.config(), decoder.dtype(), groups.held_experts());
  for (std::size_t i = 0; i < weights.size(); ++i) decoder.parameters()[i].value.copy_(weights[i].value);
  const OptimizerFiles files(optimizer_paths(checkpoint));
  for (const optim::Slot& slot : masters.slots()) {
    files.load(slot);
    const auto loaded =
        std::find_if(weights.begin(), weights.end(), [&](const auto& p) { return p.name == slot.name; });
    require_config(
        at::equal(loaded->value, slot.master.to(slot.value.scalar_type())),
        "{}: the weights of {} are not its rounded masters; start from the weights alone with --weights-only",
        checkpoint.string(), slot.name);
  }
  TrainingState state = read_state(checkpoint);
  groups.world->barrier();
  return state;
}

}  // namespace collegium::train
