// SPDX-License-Identifier: Apache-2.0
#pragma once

// Hugging Face model directories: config.json + (sharded) safetensors under the family's tensor names.

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "collegium/model/config.h"
#include "collegium/model/parameters.h"

namespace collegium::model {

/// What     Loads every parameter of `config` from DIR/model.safetensors or the sharded index, converted to
/// `dtype`.
///          Fused expert names (transformers 5 in memory) are accepted too.
/// Throws   ConfigError naming the tensor and file: missing, extra, mis-shaped, non-finite, truncated,
/// corrupt header.
std::vector<Parameter> load_parameters(const std::filesystem::path& directory, const ModelConfig& config,
                                       at::ScalarType dtype);

/// What     Writes config.json and the weights (sharded above `max_shard_bytes`), each file atomically.
/// `value_of` gives
///          the tensor to write for a parameter (its value, or the rounded master).
/// Throws   Error naming the file when the disk is full or the folder cannot be written.
void save_model(const std::filesystem::path& directory, const ModelConfig& config,
                const std::vector<Parameter>& parameters,
                const std::function<at::Tensor(const Parameter&)>& value_of,
                std::int64_t max_shard_bytes = 5'000'000'000);

}  // namespace collegium::model
