// SPDX-License-Identifier: Apache-2.0
#pragma once

// Checkpoints of a run: RUN/step-00000100 is a Hugging Face model folder plus `training/`, in which
//   - optimizer-00000.safetensors and so on are masters and moments, by the ranks that wrote them
//     (optimizer_files.h),
//   - state.json has step, samples, tokens, seconds and the run configuration,
//   - manifest.json has size and checksum of every other file; written last, it commits the checkpoint.
// The folder is written under a temporary name, synced and renamed, so a killed run leaves the older ones
// untouched. The ranks share a file system. Nothing in it depends on the number of ranks that wrote it but
// how tensors are spread over files: any ranks can read what any others wrote.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "collegium/base/fields.h"
#include "collegium/model/decoder.h"
#include "collegium/optim/master_weights.h"
#include "collegium/parallel/groups.h"

namespace collegium::train {

struct TrainingState {
  std::int64_t step = 0;
  std::int64_t samples = 0;  ///< sequences consumed
  std::int64_t tokens = 0;   ///< target tokens trained on
  double elapsed_seconds = 0.0;
  Json run_config = Json::object();
};

/// A file that is not ours but belongs to the model: its tokenizer and the like.
struct CompanionFile {
  std::string name;
  std::string content;
};

/// What     Writes RUN/step-N and removes checkpoints beyond the newest `keep_last` (0 = keep all). World
///          rank 0 writes what all ranks have; the experts are written by the ranks of their first copy
///          (edp = 0). Rank 0's `companions` are written beside them.
/// Comm     collective over the world: three gathers of a few bytes per tensor; nobody commits before every
///          rank has written.
/// Returns  its folder.
/// Throws   on all ranks, and nothing is left of the checkpoint. Error on the rank where it happened: a
///          parameter is not finite (named), the disk is full, the folder cannot be written. PeerFailure on
///          the others.
std::filesystem::path save_checkpoint(const std::filesystem::path& run_folder, const model::Decoder& decoder,
                                      const optim::MasterWeights& masters, const TrainingState& state,
                                      const std::vector<CompanionFile>& companions, std::int64_t keep_last,
                                      const parallel::Groups& groups);

/// What     The newest committed checkpoint of a run folder; uncommitted and temporary folders are passed
///          over.
std::optional<std::filesystem::path> find_latest_checkpoint(const std::filesystem::path& run_folder);

/// What     Removes what killed runs left: temporary folders.
void remove_temporary_folders(const std::filesystem::path& run_folder);
/// What     Removes every checkpoint of a run. Each is a temporary folder first, so that nothing half removed
///          is taken for one.
void remove_checkpoints(const std::filesystem::path& run_folder);

/// What     Warns of weights beside a manifest that are not those that training wrote: edited, or damaged.
void warn_of_changed_weights(const std::filesystem::path& model_directory);

/// What     Checks every file against the manifest.
/// Throws   ConfigError naming the file: missing, other size, other checksum.
void verify_checkpoint(const std::filesystem::path& checkpoint);

/// What     The run configuration that a checkpoint was made with, after its file was verified.
/// Throws   ConfigError naming the file: missing, damaged, or without a part.
Json saved_run_config(const std::filesystem::path& checkpoint);

/// What     Loads masters, moments and buffers, of the experts those held here, into `decoder` and
///          `masters`, whatever ranks wrote them.
/// Comm     collective over the world: two barriers. Every rank verifies its share of the files.
/// Throws   ConfigError on the rank that found it: a file differs from the manifest (verify_checkpoint); a
///          tensor is missing or mis-shaped, an expert's is missing or there twice; the weights are not the
///          rounded masters (someone edited them). The other ranks end in the barrier with PeerFailure.
TrainingState load_checkpoint(const std::filesystem::path& checkpoint, model::Decoder& decoder,
                              optim::MasterWeights& masters, const parallel::Groups& groups);

}  // namespace collegium::train
