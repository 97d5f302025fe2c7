// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "collegium/comm/communicator.h"
#include "collegium/model/decoder.h"

namespace collegium::model {

struct SamplingOptions {
  std::int64_t max_tokens = 64;
  double temperature = 1.0;  ///< 0 = always the likeliest token
  std::int64_t top_k = 0;    ///< sample from the k likeliest; 0 = all
  double top_p = 1.0;        ///< sample from the smallest set with at least this probability
  std::uint64_t seed = 0;
  std::vector<std::int64_t> eos_ids;  ///< stop after any of these tokens
};
/// Throws ConfigError naming the option, its value and the rule.
void validate(const SamplingOptions& options);

/// What     Refuses models that cannot continue a text token by token: with expert choice, which looks at
///          tokens that are not there yet, and with capacity groups of several sequences in evaluation.
/// Throws   ConfigError naming `what` and the option.
void require_generation(const ModelConfig& config, const std::string& what);

/// What     The next token from a row of logits [V]: temperature, then top-k, then top-p; ties to the lower
///          id.
/// Order    A function of logits, options and `index` (how many tokens were sampled before).
std::int64_t sample_token(const at::Tensor& logits_V, const SamplingOptions& options, std::int64_t index);

/// What     Continues the prompt, one token at a time, with a key/value cache. Tokens that are computed
///          together (the prompt's, then each new one) share a capacity where there is one in evaluation.
/// Comm     `world` (nullptr: this rank alone) are the ranks that hold the model's experts, and all of them
///          call this. Rank 0 computes and samples; the others take part in the layers' exchanges. Broadcast
///          of 8 bytes per token.
/// Returns  the new tokens, on all ranks. `on_token` (optional) sees each as it comes, on rank 0.
/// Throws   ConfigError: empty prompt, id outside the vocabulary, more than max_positions in all, and as
///          require_generation(). Error: a logit that is not finite.
std::vector<std::int64_t> generate(const Decoder& decoder, const std::vector<std::int64_t>& prompt,
                                   const SamplingOptions& options,
                                   const std::function<void(std::int64_t)>& on_token = {},
                                   comm::Communicator* world = nullptr);

}  // namespace collegium::model
