// SPDX-License-Identifier: Apache-2.0

// The planner's count of what a forward pass keeps against what it leaves in the arena.

#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "collegium/model/decoder.h"
#include "collegium/model/parameters.h"
#include "collegium/ops/arena.h"
#include "collegium/train/prediction.h"

namespace collegium {
namespace {

constexpr std::int64_t kSequences = 8;
constexpr std::int64_t kLength = 512;

model::ModelConfig config() {
  model::ModelConfig c;
  c.family = model::Family::kCollegium;
  c.vocab_size = 64;
  c.hidden_size = 64;
  c.num_layers = 3;
  c.num_heads = 4;
  c.num_kv_heads = 2;
  c.dense_ffn_size = 96;
  c.max_positions = kLength;
  c.moe_layers = {true, false, true};
  c.moe.num_experts = 8;
  c.moe.top_k = 4;
  c.moe.ffn_size = 48;
  model::complete(c);
  return c;
}

double measured(const model::ModelConfig& c, bool recompute) {
  std::vector<model::Parameter> parameters = model::list_parameters(c);
  model::initialize_parameters(c, /*seed=*/1, at::kFloat, parameters);
  for (model::Parameter& parameter : parameters) parameter.value.requires_grad_(true);
  const model::Decoder decoder(c, std::move(parameters));
  const at::Tensor ids = at::zeros({kSequences, kLength}, at::kLong);
  model::ForwardOptions options;
  options.context.training = true;
  options.recompute = recompute;
  const auto before = static_cast<double>(ops::arena_statistics().in_use_bytes);
  const model::ForwardResult result = decoder.forward(ids, options);
  return static_cast<double>(ops::arena_statistics().in_use_bytes) - before;
}

TEST(Activations, equal_what_a_forward_pass_leaves_behind) {
  ops::install_arena();
  for (const bool clipped : {false, true}) {
    model::ModelConfig c = config();
    if (clipped) c.clip_qkv = 8.0;
    plan::OwnRun run;
    run.model = train::model_spec(c);
    run.dtype = "float32";
    run.clipped_qkv = clipped;
    const plan::OwnActivations bytes = plan::own_activations(run);
    const double tokens = kSequences * kLength;
    // The arena does not hold tensors below 64 KiB (one fp32 per token is 16 KiB), and the loss, which
    // `outside` counts with one hidden state and the targets, has not run. Both are a few hundredths of the
    // whole.
    const double outside = bytes.outside - 64 * 4.0 - 16.0;
    EXPECT_NEAR(measured(c, false) / (tokens * (bytes.layers + outside)), 1.0, 0.03);
    EXPECT_NEAR(measured(c, true) / (tokens * (bytes.recomputed + outside)), 1.0, 0.1);
    EXPECT_LT(bytes.recomputed, bytes.layers / 5);
  }
}

}  // namespace
}  // namespace collegium
