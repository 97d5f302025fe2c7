// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "collegium/model/parameters.h"

namespace collegium::train {

/// What     Whether `text` matches `pattern`, in which * stands for any text, also none.
bool matches(std::string_view pattern, std::string_view text);

/// What     Marks parameters as not trainable whose on-disk tensors match a pattern.
/// Throws   ConfigError: a pattern that matches nothing, one that matches only a part of a parameter (the
/// experts of a layer
///          are one), or nothing left to train.
void freeze_parameters(const model::ModelConfig& config, const std::vector<std::string>& patterns,
                       std::vector<model::Parameter>& parameters);

}  // namespace collegium::train
