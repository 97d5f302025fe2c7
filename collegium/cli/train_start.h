// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "collegium/base/file.h"
#include "collegium/cli/train_loop.h"
#include "collegium/train/trainer.h"

namespace collegium::cli {

/// What     Where a run begins: at the run folder's newest checkpoint, at the weights that --weights-only
///          names, or at initial weights; with the routing to replay and to record, and a folder to write to.
/// Comm     collective over the world: every rank has read its checkpoint before the folder changes.
/// Returns  on rank 0 what keeps the run folder for this run as long as it lives.
/// Throws   ConfigError: a checkpoint of another run, checkpoints that --weights-only would pass over,
///          another process that writes to the run folder; Error: a folder or file that cannot be written.
std::unique_ptr<FolderLock> start_or_resume(const train::RunConfig& config, const TrainRequest& request,
                                            train::Trainer& trainer);

}  // namespace collegium::cli
