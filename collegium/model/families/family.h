// SPDX-License-Identifier: Apache-2.0
#pragma once

// What differs between the families' files: keys of config.json and names of tensors. One file per family.

#include <optional>
#include <string>
#include <utility>

#include "collegium/model/config.h"

namespace collegium::model {

/// On-disk names inside `model.layers.N.`; `%` in an expert's name stands for its number.
struct TensorNames {
  std::string router;
  std::string expert_gate;
  std::string expert_up;
  std::string expert_down;
};
/// What     The names of a family; collegium_moe uses those of qwen3_moe.
TensorNames tensor_names(Family family);

/// What     Reads keys of a Hugging Face config.json with the class defaults of its family.
/// Throws   ConfigError naming file, key, value and rule.
class HfReader {
 public:
  HfReader(const Json& json, std::string origin) : json_(json), origin_(std::move(origin)) {}

  /// The value of the first of the keys that is present and not null, else the default.
  template <typename T>
  T get(std::initializer_list<const char*> keys, T fallback) const {
    for (const char* key : keys) {
      const auto found = json_.find(key);
      if (found == json_.end() || found->is_null()) continue;
      read_fields(*found, origin_ + ": " + key, fallback);
      break;
    }
    return fallback;
  }
  template <typename T>
  T get(const char* key, T fallback) const {
    return get({key}, std::move(fallback));
  }
  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }
  const Json& json() const { return json_; }
  const std::string& origin() const { return origin_; }

 private:
  const Json& json_;
  std::string origin_;
};

/// What     A family's config.json as a model, before complete().
ModelConfig parse_mixtral(const HfReader& reader);
ModelConfig parse_olmoe(const HfReader& reader);
ModelConfig parse_qwen3_moe(const HfReader& reader);

/// What     Why the family cannot express this model in evaluation, or nothing when it can.
std::optional<std::string> not_mixtral(const ModelConfig& config);
std::optional<std::string> not_olmoe(const ModelConfig& config);
std::optional<std::string> not_qwen3_moe(const ModelConfig& config);

/// What     The family's keys, written over those of `json`.
void write_mixtral(const ModelConfig& config, Json& json);
void write_olmoe(const ModelConfig& config, Json& json);
void write_qwen3_moe(const ModelConfig& config, Json& json);

/// Throws ConfigError for more layers than can be listed one by one.
void require_listable(const ModelConfig& config);

/// The keys that all three families share, read and written.
ModelConfig parse_common(const HfReader& reader, const ModelConfig& defaults);
void write_common(const ModelConfig& config, Json& json);
/// Softmax over all experts, plain top-K, no shared expert, nothing but the family's own weights.
std::optional<std::string> not_plain_router(const ModelConfig& config);

}  // namespace collegium::model
