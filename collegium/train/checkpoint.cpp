// SPDX-License-Identifier: Apache-2.0
#include "collegium/train/checkpoint.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/file.h"
#include "collegium/model/checkpoint_io.h"
#include "collegium/model/tensor_io.h"

namespace collegium::train {

namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "training/manifest.json";

bool is_checkpoint_name(const std::string& name) {
  return name.starts_with("step-") && name.size() > 5 &&
         std::all_of(name.begin() + 5, name.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// Committed checkpoints, oldest first.
std::vector<fs::path> list_checkpoints(const fs::path& run_folder) {
  std::vector<fs::path> found;
  if (!fs::is_directory(run_folder)) return found;
  for (const auto& entry : fs::directory_iterator(run_folder)) {
    if (is_checkpoint_name(entry.path().filename().string()) && fs::exists(entry.path() / kManifest)) {
      found.push_back(entry.path());
    }
  }
  std::sort(found.begin(), found.end(), [](const fs::path& a, const fs::path& b) {
    return std::stoll(a.filename().string().substr(5)) < std::stoll(b.filename().string().substr(5));
  });
  return found;
}

Json parse_json_file(const fs::path& file) {
  try {
    return Json::parse(read_file(file));
  } catch (const Json::exception& error) {
    throw ConfigError(fmt::format("{}: not valid JSON: {}", file.string(), error.what()));
  }
}

void require_finite(const optim::MasterWeights& masters) {
  for (const optim::Slot& slot : masters.slots()) {
    if (!at::isfinite(slot.master).all().item<bool>()) {
      throw Error(fmt::format("parameter {} is not finite: no checkpoint is written", slot.name));
    }
  }
}

void write_training_folder(const fs::path& folder, const optim::MasterWeights& masters,
                           const TrainingState& state) {
  fs::create_directories(folder / "training");
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const optim::Slot& slot : masters.slots()) {
    tensors.emplace_back(slot.name + "/master", slot.master);
    tensors.emplace_back(slot.name + "/first_moment", slot.first_moment);
    tensors.emplace_back(slot.name + "/second_moment", slot.second_moment);
  }
  model::write_tensors(folder / "training/optimizer.safetensors", tensors);
  const Json json = {{"step", state.step},
                     {"samples", state.samples},
                     {"tokens", state.tokens},
                     {"elapsed_seconds", state.elapsed_seconds},
                     {"run_config", state.run_config}};
  write_file_atomically(folder / "training/state.json", json.dump(1));
}

void write_manifest(const fs::path& folder) {
  Json files = Json::object();
  std::vector<fs::path> paths;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  for (const fs::path& path : paths) {
    files[fs::relative(path, folder).string()] = {{"bytes", fs::file_size(path)},
                                                  {"xxh3", checksum_file(path)}};
  }
  write_file_atomically(folder / kManifest, Json{{"version", 1}, {"files", files}}.dump(1));
}

void prune(const fs::path& run_folder, std::int64_t keep_last) {
  if (keep_last == 0) return;
  std::vector<fs::path> checkpoints = list_checkpoints(run_folder);
  const auto keep = static_cast<std::size_t>(keep_last);
  for (std::size_t i = 0; i + keep < checkpoints.size(); ++i) {
    // Without its manifest a half-removed folder is no checkpoint.
    fs::remove(checkpoints[i] / kManifest);
    fs::remove_all(checkpoints[i]);
  }
}

void load_slot(const SafetensorsFile& file, const std::string& name, at::Tensor target) {
  const at::Tensor tensor = model::read_tensor(file, name);
  require_config(tensor.sizes() == target.sizes() && tensor.scalar_type() == target.scalar_type(),
                 "{}: tensor '{}' has another shape or dtype than the model of this run",
                 file.path().string(), name);
  target.copy_(tensor);
}

}  // namespace

fs::path save_checkpoint(const fs::path& run_folder, const model::Decoder& decoder,
                         const optim::MasterWeights& masters, const TrainingState& state,
                         const fs::path& tokenizer_file, std::int64_t keep_last) {
  require_finite(masters);
  const fs::path final_path = run_folder / fmt::format("step-{:08}", state.step);
  const fs::path temporary = run_folder / fmt::format("step-{:08}.tmp-{}", state.step, ::getpid());
  try {
    fs::remove_all(temporary);
    model::save_model(temporary, decoder.config(), decoder.parameters(),
                      [](const model::Parameter& p) { return p.value; });
    if (!tokenizer_file.empty())
      write_file_atomically(temporary / "tokenizer.model", read_file(tokenizer_file));
    write_training_folder(temporary, masters, state);
    write_manifest(temporary);
    fs::remove_all(final_path);
    fs::rename(temporary, final_path);
    sync_folder(run_folder);
  } catch (const fs::filesystem_error& error) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw Error(fmt::format("cannot write checkpoint {}: {}", final_path.string(), error.code().message()));
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
  prune(run_folder, keep_last);
  return final_path;
}

std::optional<fs::path> find_latest_checkpoint(const fs::path& run_folder) {
  const std::vector<fs::path> checkpoints = list_checkpoints(run_folder);
  return checkpoints.empty() ? std::nullopt : std::optional(checkpoints.back());
}

void remove_temporary_folders(const fs::path& run_folder) {
  if (!fs::is_directory(run_folder)) return;
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(run_folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("step-") && name.find(".tmp-") != std::string::npos) stale.push_back(entry.path());
  }
  for (const fs::path& path : stale) fs::remove_all(path);
}

void verify_checkpoint(const fs::path& checkpoint) {
  require_config(fs::exists(checkpoint / kManifest), "{}: not a committed checkpoint ({} is missing)",
                 checkpoint.string(), kManifest);
  const Json manifest = parse_json_file(checkpoint / kManifest);
  require_config(manifest.contains("files") && manifest["files"].is_object(), "{}: {} lists no files",
                 checkpoint.string(), kManifest);
  for (const auto& [name, entry] : manifest["files"].items()) {
    const fs::path path = checkpoint / name;
    require_config(fs::exists(path), "{}: {} is missing", checkpoint.string(), name);
    const auto bytes = entry.value("bytes", std::uintmax_t{0});
    require_config(fs::file_size(path) == bytes, "{}: {} has {} bytes, the manifest says {}",
                   checkpoint.string(), name, fs::file_size(path), bytes);
    const std::string sum = checksum_file(path);
    require_config(sum == entry.value("xxh3", ""),
                   "{}: {} is damaged or was changed: checksum {}, the manifest says {}; "
                   "start from its weights alone with --weights-only",
                   checkpoint.string(), name, sum, entry.value("xxh3", ""));
  }
}

TrainingState load_checkpoint(const fs::path& checkpoint, model::Decoder& decoder,
                              optim::MasterWeights& masters) {
  verify_checkpoint(checkpoint);
  const at::NoGradGuard no_grad;
  const std::vector<model::Parameter> weights =
      model::load_parameters(checkpoint, decoder.config(), decoder.dtype());
  for (std::size_t i = 0; i < weights.size(); ++i) decoder.parameters()[i].value.copy_(weights[i].value);
  const SafetensorsFile file(checkpoint / "training/optimizer.safetensors");
  for (optim::Slot& slot : masters.slots()) {
    load_slot(file, slot.name + "/master", slot.master);
    load_slot(file, slot.name + "/first_moment", slot.first_moment);
    load_slot(file, slot.name + "/second_moment", slot.second_moment);
    const auto loaded =
        std::find_if(weights.begin(), weights.end(), [&](const auto& p) { return p.name == slot.name; });
    require_config(
        at::equal(loaded->value, slot.master.to(slot.value.scalar_type())),
        "{}: the weights of {} are not its rounded masters; start from the weights alone with --weights-only",
        checkpoint.string(), slot.name);
  }
  const Json json = parse_json_file(checkpoint / "training/state.json");
  try {
    return {.step = json.at("step").get<std::int64_t>(),
            .samples = json.at("samples").get<std::int64_t>(),
            .tokens = json.at("tokens").get<std::int64_t>(),
            .elapsed_seconds = json.at("elapsed_seconds").get<double>(),
            .run_config = json.at("run_config")};
  } catch (const Json::exception& error) {
    throw ConfigError(fmt::format("{}: training/state.json: {}", checkpoint.string(), error.what()));
  }
}

}  // namespace collegium::train
