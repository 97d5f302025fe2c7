// SPDX-License-Identifier: Apache-2.0
#pragma once

// The experts that a recorded run chose, in place of the routers' choice.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <vector>

#include "collegium/moe/options.h"
#include "collegium/moe/routing_record.h"
#include "collegium/train/batch.h"

namespace collegium::train {

/// What a run asks a record for.
struct ReplayRequest {
  StepShape shape;
  moe::MoeOptions moe;
  std::int64_t num_moe_layers = 0;
  std::int64_t first_step = 1;
  std::int64_t last_step = 0;
};

class Replay {
 public:
  /// Throws   ConfigError naming file, step, micro-step and layer unless the file has a record of the right
  ///          sizes for every one of them that the run will ask for.
  Replay(const std::filesystem::path& file, const ReplayRequest& request);

  /// What     Each MoE layer's choices for this rank's tokens of a micro-step.
  /// Shape    int32 [T, record_width] each.
  /// Throws   ConfigError when a record names an expert that does not exist.
  std::vector<at::Tensor> ids_of_layers(const MicroBatch& batch, std::int64_t step,
                                        std::int64_t micro_step) const;

 private:
  ReplayRequest request_;
  moe::RoutingReplay records_;
};

}  // namespace collegium::train
