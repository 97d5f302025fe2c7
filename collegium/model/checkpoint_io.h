// SPDX-License-Identifier: Apache-2.0
#pragma once

// Hugging Face model directories: config.json + (sharded) safetensors under the family's tensor names.
// Several ranks may write one directory: each its own shards, one of them what describes the whole.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "collegium/model/config.h"
#include "collegium/model/parameters.h"

namespace collegium::model {

inline constexpr std::int64_t kMaxShardBytes = 5'000'000'000;

/// What     Loads the parameters of `config`, of the experts only those in `held`, from
///          DIR/model.safetensors or the sharded index, converted to `dtype`. Experts that are not held may
///          be there and are not read. Fused expert names (transformers 5 in memory) are accepted too.
/// Throws   ConfigError naming the tensor and file: missing, extra, mis-shaped, non-finite, truncated,
///          corrupt header; a folder with a single file and an index.
std::vector<Parameter> load_parameters(const std::filesystem::path& directory, const ModelConfig& config,
                                       at::ScalarType dtype, const ExpertRange& held = {});

/// What     Writes config.json and the weights (sharded above `max_shard_bytes`), each file atomically.
///          `value_of` gives the tensor to write for a parameter (its value, or the rounded master).
/// Throws   Error naming the file when the disk is full or the folder cannot be written.
void save_model(const std::filesystem::path& directory, const ModelConfig& config,
                const std::vector<Parameter>& parameters,
                const std::function<at::Tensor(const Parameter&)>& value_of,
                std::int64_t max_shard_bytes = kMaxShardBytes);

/// Which of the parameters that a rank holds it also writes.
struct ModelShare {
  bool experts = true;
  bool others = true;
};

/// Which file holds which tensor.
struct WeightIndex {
  std::map<std::string, std::string> file_of;
  std::int64_t total_bytes = 0;

  /// Throws InternalError when a tensor is in both.
  void add(const WeightIndex& other);
};

/// One rank's shards. The ranks agree on their numbers before any is written.
class ShardWriter {
 public:
  ShardWriter(const ModelConfig& config, const std::vector<Parameter>& parameters,
              const std::function<at::Tensor(const Parameter&)>& value_of, const ModelShare& share,
              std::int64_t max_shard_bytes = kMaxShardBytes);

  /// 0 for a rank that writes nothing.
  std::int64_t num_shards() const { return static_cast<std::int64_t>(shards_.size()); }

  /// What     Writes the shards as numbers first, first + 1, ... (from 1) of the `total` of all ranks, each
  ///          atomically. A single one is called model.safetensors.
  /// Throws   Error naming the file when the disk is full or the folder cannot be written.
  WeightIndex write(const std::filesystem::path& directory, std::int64_t first, std::int64_t total) const;

 private:
  std::vector<std::vector<std::pair<std::string, at::Tensor>>> shards_;
};

/// What     Writes config.json and, for more than one shard, the index of all ranks' shards.
/// Returns  the names of the files written.
/// Throws   as ShardWriter::write.
std::vector<std::string> write_model_description(const std::filesystem::path& directory,
                                                 const ModelConfig& config, at::ScalarType dtype,
                                                 const WeightIndex& index);

}  // namespace collegium::model
