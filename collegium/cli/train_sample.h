// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "collegium/data/dataset.h"
#include "collegium/data/tokenizer.h"
#include "collegium/train/run_config.h"
#include "collegium/train/trainer.h"

namespace collegium::cli {

/// The text that ends a run; checked before the run.
class RunSample {
 public:
  /// What     Reads logging.sample_prompt, if there is one.
  /// Throws   ConfigError: no tokenizer, or longer than the model's positions.
  RunSample(const train::RunConfig& config, const data::Dataset& dataset, const model::ModelConfig& model);

  /// What     The prompt and what the model makes of it; empty without a prompt.
  /// Comm     collective over the trainer's world.
  std::string generate(const train::Trainer& trainer) const;

 private:
  std::optional<data::Tokenizer> tokenizer_;  // none: no sample is wanted
  std::vector<std::int64_t> ids_;             // the prompt
  std::vector<std::int64_t> eos_ids_;
  std::int64_t max_tokens_;
  std::uint64_t seed_;
};

}  // namespace collegium::cli
