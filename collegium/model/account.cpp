// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/account.h"

#include <cmath>

#include "collegium/model/parameters.h"
#include "collegium/moe/capacity.h"
#include "collegium/plan/account.h"

namespace collegium::model {

ParameterAccount count_parameters(const ModelConfig& config) {
  ParameterAccount account;
  for (const Parameter& p : list_parameters(config)) {
    if (p.kind == ParameterKind::kBuffer) continue;
    const std::int64_t count = num_values(p);
    account.total += count;
    if (p.kind == ParameterKind::kExpert) {
      account.experts += count;
      // Of one expert, times the experts of a token, which are no whole number where experts choose.
      const std::int64_t of_one = count / config.moe.num_experts;
      account.active += std::llround(static_cast<double>(of_one) * moe::experts_per_token(config.moe));
      continue;
    }
    account.active += count;
    if (p.kind == ParameterKind::kRouter) {
      account.router += count;
    } else if (p.kind == ParameterKind::kEmbedding) {
      account.embedding += count;
    } else {
      account.dense += count;
      account.norms += p.kind == ParameterKind::kNorm ? count : 0;
    }
  }
  return account;
}

double training_flops_per_token(const ModelConfig& config, std::int64_t sequence_length) {
  const ParameterAccount account = count_parameters(config);
  const auto embedding = static_cast<double>(config.vocab_size * config.hidden_size);
  // The input embedding is a look-up; a tied one is counted once in `active`, and that once is the output
  // product.
  const double products =
      static_cast<double>(account.active - account.norms) - (config.tie_embeddings ? 0.0 : embedding);
  const double keys = plan::mean_visible_keys(static_cast<double>(sequence_length), config.sliding_window);
  const double attention = static_cast<double>(config.num_layers * config.num_heads) * 2.0 * 2.0 *
                           static_cast<double>(config.head_dim) * keys;
  return 3.0 * (2.0 * products + attention);
}

}  // namespace collegium::model
