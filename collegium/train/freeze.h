// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "collegium/model/parameters.h"

namespace collegium::train {

/// What     Whether `text` matches `pattern`, in which * stands for any text, also none.
bool matches(std::string_view pattern, std::string_view text);

/// What of the whole model is not trained.
struct Freezing {
  std::set<std::string> disk_names;  ///< of the tensors on disk that some pattern matches
  std::vector<bool> trained;         ///< of list_parameters(config): whether any part of it is trained
};

/// What     What the patterns match. Needs no weights.
/// Throws   ConfigError: a pattern that matches nothing, or nothing left to train.
Freezing find_frozen(const model::ModelConfig& config, const std::vector<std::string>& patterns);

/// What     Marks what is not trained: parameters whose on-disk tensors are all frozen are not trainable; of
///          others (the experts of a layer are one parameter, and so are a gate and an up matrix) the part
///          that is frozen. A frozen expert bias is not updated. `parameters` are those that a rank holds.
void freeze_parameters(const model::ModelConfig& config, const Freezing& freezing,
                       std::vector<model::Parameter>& parameters);

}  // namespace collegium::train
