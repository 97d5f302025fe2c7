// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/generate.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/tensor.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/base/rng.h"
#include "collegium/model/tensor_io.h"

namespace collegium::model {

void validate(const SamplingOptions& o) {
  require_config(o.max_tokens >= 1, "--max-tokens {}: must be at least 1", o.max_tokens);
  require_config(o.temperature >= 0.0, "--temperature {}: must not be negative", o.temperature);
  require_config(o.top_k >= 0, "--top-k {}: must not be negative (0 = all)", o.top_k);
  require_config(o.top_p > 0.0 && o.top_p <= 1.0, "--top-p {}: must lie in (0, 1]", o.top_p);
}

void require_generation(const ModelConfig& config, const std::string& what) {
  require_config(config.moe.router.selection != moe::Selection::kExpertChoice,
                 "{}: model.moe.router.selection = \"expert_choice\": text cannot be generated, as experts "
                 "choose among all tokens of a sequence, later ones too",
                 what);
  moe::require_single_sequences(config.moe, what);
}

std::int64_t sample_token(const at::Tensor& logits_V, const SamplingOptions& options, std::int64_t index) {
  const at::Tensor logits = logits_V.to(at::kDouble);
  const auto [sorted, order] = at::sort(logits, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  if (options.temperature == 0.0) return order[0].item<std::int64_t>();
  const std::int64_t kept =
      options.top_k > 0 ? std::min<std::int64_t>(options.top_k, sorted.size(0)) : sorted.size(0);
  const at::Tensor probs = at::softmax(sorted.narrow(0, 0, kept) / options.temperature, 0).contiguous();
  const auto* p = probs.const_data_ptr<double>();
  double nucleus = 0.0;
  std::int64_t count = 0;
  while (count < kept && nucleus < options.top_p) nucleus += p[count++];
  const double target =
      RandomStream(options.seed, "generate").uniform(static_cast<std::uint64_t>(index)) * nucleus;
  double cumulative = 0.0;
  std::int64_t chosen = 0;
  for (; chosen + 1 < count; ++chosen) {
    cumulative += p[chosen];
    if (cumulative > target) break;
  }
  return order[chosen].item<std::int64_t>();
}

namespace {

void require_finite(const at::Tensor& logits_V, std::int64_t position) {
  if (at::isfinite(logits_V).all().item<bool>()) return;
  throw Error(
      fmt::format("generation: the logits of token {} are not finite: an activation exceeds what {} can hold",
                  position, dtype_name(logits_V.scalar_type())));
}

}  // namespace

std::vector<std::int64_t> generate(const Decoder& decoder, const std::vector<std::int64_t>& prompt,
                                   const SamplingOptions& options,
                                   const std::function<void(std::int64_t)>& on_token,
                                   comm::Communicator* world) {
  validate(options);
  const ModelConfig& config = decoder.config();
  require_generation(config, "generation");
  require_config(!prompt.empty(), "the prompt is empty: it needs at least one token");
  for (const std::int64_t id : prompt) {
    require_config(id >= 0 && id < config.vocab_size, "prompt token {}: must lie in [0, vocab_size = {})", id,
                   config.vocab_size);
  }
  const auto length = static_cast<std::int64_t>(prompt.size());
  require_config(options.max_tokens <= config.max_positions - length,
                 "{} prompt tokens and --max-tokens {}: more than the model's max_positions = {}", length,
                 options.max_tokens, config.max_positions);
  const at::NoGradGuard no_grad;
  const bool is_root = world == nullptr || world->rank() == 0;
  KvCache cache;
  at::Tensor ids = at::tensor(prompt, at::kLong).unsqueeze(0).narrow(0, 0, is_root ? 1 : 0);
  const at::Tensor next = at::empty({1, 1}, at::kLong);
  std::vector<std::int64_t> tokens;
  while (static_cast<std::int64_t>(tokens.size()) < options.max_tokens) {
    ForwardOptions forward;
    forward.cache = &cache;
    const at::Tensor hidden = decoder.forward(ids, forward).hidden_BSD;
    if (is_root) {
      const at::Tensor logits = decoder.logits(hidden.select(1, hidden.size(1) - 1)).squeeze(0);
      require_finite(logits, length + static_cast<std::int64_t>(tokens.size()));
      next.fill_(sample_token(logits, options, static_cast<std::int64_t>(tokens.size())));
    }
    if (world != nullptr) world->broadcast(next, 0).wait();
    tokens.push_back(next.item<std::int64_t>());
    if (is_root && on_token) on_token(tokens.back());
    if (std::find(options.eos_ids.begin(), options.eos_ids.end(), tokens.back()) != options.eos_ids.end())
      break;
    ids = next.narrow(0, 0, is_root ? 1 : 0);
  }
  return tokens;
}

}  // namespace collegium::model
