// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "collegium/model/parameters.h"

namespace collegium::train {

/// What     Whether `text` matches `pattern`, in which * stands for any text, also none.
bool matches(std::string_view pattern, std::string_view text);

/// What     Marks what is not trained: parameters whose on-disk tensors all match some pattern are not
///          trainable; of others (the experts of a layer are one parameter, and so are a gate and an up
///          matrix) the part that matches is frozen. A frozen expert bias is not updated.
/// Throws   ConfigError: a pattern that matches nothing, or nothing left to train.
void freeze_parameters(const model::ModelConfig& config, const std::vector<std::string>& patterns,
                       std::vector<model::Parameter>& parameters);

}  // namespace collegium::train
