// SPDX-License-Identifier: Apache-2.0
#pragma once

// `collegium train`, after its command line was read: the loop around Trainer::step(), and what is shown at
// the end. All ranks run it; rank 0 shows and writes.

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "collegium/comm/communicator.h"
#include "collegium/train/prediction.h"
#include "collegium/train/run_config.h"
#include "collegium/train/validation.h"

namespace collegium::cli {

struct TrainRequest {
  std::string record_routing;
  std::string replay_routing;
  bool fresh = false;        ///< start over although the run folder has checkpoints
  std::string weights_only;  ///< start from the weights of this checkpoint or model folder
};

/// Why a run ended before its last step: a signal asks for a quick end, so nothing but a checkpoint follows;
/// when train.max_minutes are up the summary is made as at the last step.
enum class Stop { kNot, kSignal, kTime };

struct TrainSummary {
  std::int64_t steps = 0;
  Stop stop = Stop::kNot;
  double seconds = 0.0;
  double tokens_per_s = 0.0;
  double share_of_gemm_peak = 0.0;
  std::string dispatcher;  ///< that was used
  double unigram_entropy = 0.0;
  train::ValidationResult validation;
  std::vector<std::string> domains;
  std::string sample;
  std::filesystem::path checkpoint;
  std::filesystem::path metrics;
  std::vector<train::PredictedFigure> comparison;  ///< with the planner; empty where no step was made
};

/// Comm     collective over `world`.
/// Returns  complete on rank 0.
TrainSummary run_training(const train::RunConfig& config, const TrainRequest& request,
                          const std::shared_ptr<comm::Communicator>& world);

void print_summary(const train::RunConfig& config, const TrainRequest& request, const TrainSummary& summary);
Json summary_json(const TrainSummary& summary);

}  // namespace collegium::cli
