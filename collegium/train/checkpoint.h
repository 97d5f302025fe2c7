// SPDX-License-Identifier: Apache-2.0
#pragma once

// Checkpoints of a run: RUN/step-00000100 is a Hugging Face model folder plus `training/`:
//   training/optimizer.safetensors   master, first and second moment of every parameter, whole, under its
//   name training/state.json              step, samples, seed, run configuration training/manifest.json size
//   and checksum of every file; written last: its presence commits the checkpoint
// The folder is written under a temporary name, synced and renamed, so a killed run leaves the older ones
// untouched.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/model/decoder.h"
#include "collegium/optim/master_weights.h"

namespace collegium::train {

struct TrainingState {
  std::int64_t step = 0;
  std::int64_t samples = 0;  ///< sequences consumed
  std::int64_t tokens = 0;   ///< target tokens trained on
  double elapsed_seconds = 0.0;
  Json run_config = Json::object();
};

/// What     Writes RUN/step-N and removes checkpoints beyond the newest `keep_last` (0 = keep all).
/// Returns  its folder.
/// Throws   Error: a parameter is not finite (named), the disk is full, the folder cannot be written.
std::filesystem::path save_checkpoint(const std::filesystem::path& run_folder, const model::Decoder& decoder,
                                      const optim::MasterWeights& masters, const TrainingState& state,
                                      const std::filesystem::path& tokenizer_file, std::int64_t keep_last);

/// What     The newest committed checkpoint of a run folder; uncommitted and temporary folders are passed
/// over.
std::optional<std::filesystem::path> find_latest_checkpoint(const std::filesystem::path& run_folder);

/// What     Removes what killed runs left: temporary folders.
void remove_temporary_folders(const std::filesystem::path& run_folder);

/// What     Checks every file against the manifest.
/// Throws   ConfigError naming the file: missing, other size, other checksum.
void verify_checkpoint(const std::filesystem::path& checkpoint);

/// What     Loads masters, moments and buffers into `decoder` and `masters`, after verify_checkpoint().
/// Throws   ConfigError: a tensor is missing or mis-shaped; the weights are not the rounded masters (someone
/// edited them).
TrainingState load_checkpoint(const std::filesystem::path& checkpoint, model::Decoder& decoder,
                              optim::MasterWeights& masters);

}  // namespace collegium::train
