// SPDX-License-Identifier: Apache-2.0
#include "collegium/cli/train_sample.h"

#include "collegium/base/error.h"
#include "collegium/model/generate.h"

namespace collegium::cli {

RunSample::RunSample(const train::RunConfig& config, const data::Dataset& dataset,
                     const model::ModelConfig& model)
    : max_tokens_(config.logging.sample_tokens), seed_(config.train.seed) {
  if (config.logging.sample_prompt.empty()) return;
  require_config(dataset.has_tokenizer(),
                 "logging.sample_prompt: data.path = {} has token ids and no tokenizer that would read it",
                 config.data.path);
  tokenizer_ = data::Tokenizer::load(dataset.tokenizer_file());
  ids_ = tokenizer_->encode(config.logging.sample_prompt, /*add_bos=*/true);
  const auto length = static_cast<std::int64_t>(ids_.size());
  require_config(length > 0, "logging.sample_prompt = \"{}\": the tokenizer makes no token of it",
                 config.logging.sample_prompt);
  model::require_generation(model, "logging.sample_prompt");
  eos_ids_ = model::read_eos_ids(config.model_source.init, model);
  if (eos_ids_.empty()) eos_ids_ = {tokenizer_->eos_id()};
  require_config(max_tokens_ <= model.max_positions - length,
                 "logging.sample_tokens = {}: with the {} tokens of logging.sample_prompt more than "
                 "model.max_positions = {}",
                 max_tokens_, length, model.max_positions);
}

std::string RunSample::generate(const train::Trainer& trainer) const {
  if (!tokenizer_) return "";
  constexpr double kTemperature = 0.8;
  constexpr double kTopP = 0.95;
  const std::vector<std::int64_t> more = model::generate(trainer.decoder(), ids_,
                                                         {.max_tokens = max_tokens_,
                                                          .temperature = kTemperature,
                                                          .top_k = 0,
                                                          .top_p = kTopP,
                                                          .seed = seed_,
                                                          .eos_ids = eos_ids_},
                                                         {}, trainer.groups().world.get());
  std::vector<std::int64_t> all = ids_;
  all.insert(all.end(), more.begin(), more.end());
  return tokenizer_->decode(all);
}

}  // namespace collegium::cli
