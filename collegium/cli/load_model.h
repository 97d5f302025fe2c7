// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

#include "collegium/comm/communicator.h"
#include "collegium/model/decoder.h"
#include "collegium/parallel/groups.h"

namespace collegium::cli {

/// A model for looking at, its experts spread over the ranks.
struct LoadedModel {
  parallel::Groups groups;
  model::Decoder decoder;
};

/// What     The model directory that a user means: a run folder stands for its newest checkpoint.
std::string find_model(const std::string& directory);

/// What     Reads `config`'s weights from a model directory; of the experts every rank reads and holds its
///          share, as the default of parallel.ep gives it.
/// Comm     collective over `world`.
/// Throws   as model::load_parameters; ConfigError where the ranks were given different directories.
LoadedModel load_model(const std::string& directory, const model::ModelConfig& config, at::ScalarType dtype,
                       const std::shared_ptr<comm::Communicator>& world);

}  // namespace collegium::cli
