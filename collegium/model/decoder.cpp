// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/decoder.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>

#include "collegium/base/error.h"
#include "collegium/model/dense_ffn.h"
#include "collegium/model/embedding.h"
#include "collegium/model/linear.h"
#include "collegium/model/norm.h"
#include "collegium/model/recompute.h"

namespace collegium::model {

/// The weights of one layer, looked up once; shared storage with the parameters.
struct Decoder::Block {
  bool has_experts = false;
  at::Tensor input_norm;
  at::Tensor post_norm;
  AttentionWeights attention;
  moe::MoeWeights moe;
  at::Tensor ffn_gate_up;
  at::Tensor ffn_down;
};

/// What a block is run with besides its input.
struct Decoder::BlockCall {
  AttentionContext attention;
  LayerCache* cache = nullptr;
  std::shared_ptr<moe::LayerRun> run;
  std::int64_t layer = 0;
  std::function<void(const std::string&, const at::Tensor&)> observer;

  void observe(const char* what, const at::Tensor& value) const {
    if (observer) observer(fmt::format("{} of layer {}", what, layer), value);
  }
};

Decoder::Decoder(const ModelConfig& config, std::vector<Parameter> parameters)
    : Decoder(config, std::move(parameters),
              {.dispatcher = moe::make_local_dispatcher(config.moe.num_experts), .overlap = {}}) {}

Decoder::Decoder(ModelConfig config, std::vector<Parameter> parameters, moe::ExpertTransport transport)
    : config_(std::move(config)), parameters_(std::move(parameters)), transport_(std::move(transport)) {
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    index_[parameters_[i].name] = i;
    parameters_[i].value.requires_grad_(parameters_[i].trainable);
  }
  for (std::int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const std::string prefix = fmt::format("layers.{}.", layer);
    const auto find = [&](const char* name) {
      const auto found = index_.find(prefix + name);
      return found == index_.end() ? at::Tensor() : parameters_[found->second].value;
    };
    auto block = std::make_shared<Block>();
    block->has_experts = config_.moe_layers[static_cast<std::size_t>(layer)];
    block->input_norm = find("input_norm");
    block->post_norm = find("post_norm");
    block->attention = {.q = find("attention.q"),
                        .k = find("attention.k"),
                        .v = find("attention.v"),
                        .o = find("attention.o"),
                        .q_norm = find("attention.q_norm"),
                        .k_norm = find("attention.k_norm")};
    block->moe = {.router = {.gate_ED = find("moe.router"),
                             .noise_ED = find("moe.noise"),
                             .expert_bias_E = find("moe.expert_bias")},
                  .gate_up_LGD = find("moe.gate_up"),
                  .down_LDF = find("moe.down"),
                  .shared_gate_up_GD = find("moe.shared_gate_up"),
                  .shared_down_DF = find("moe.shared_down"),
                  .shared_gate_1D = find("moe.shared_gate"),
                  .shared_mix_2D = find("moe.shared_mix")};
    block->ffn_gate_up = find("ffn.gate_up");
    block->ffn_down = find("ffn.down");
    blocks_.push_back(std::move(block));
  }
}

const Parameter& Decoder::parameter(const std::string& name) const {
  const auto found = index_.find(name);
  COLLEGIUM_CHECK(found != index_.end(), "no parameter '{}'", name);
  return parameters_[found->second];
}

std::int64_t Decoder::num_moe_layers() const {
  return std::count(config_.moe_layers.begin(), config_.moe_layers.end(), true);
}

at::Tensor Decoder::run_block(const Block& block, const at::Tensor& x_BSD, const BlockCall& call) const {
  const at::Tensor attended_BSD =
      attention(config_, block.attention, rms_norm(x_BSD, block.input_norm, config_.norm_eps), call.attention,
                call.cache);
  call.observe("attention output", attended_BSD);
  const at::Tensor mixed_BSD = x_BSD + attended_BSD;
  const at::Tensor normed_TD =
      rms_norm(mixed_BSD, block.post_norm, config_.norm_eps).reshape({-1, config_.hidden_size});
  call.observe("feed-forward input", normed_TD);
  const at::Tensor y_TD = block.has_experts
                              ? moe::moe_layer(config_.moe, block.moe, transport_, normed_TD, call.run)
                              : dense_ffn(normed_TD, block.ffn_gate_up, block.ffn_down);
  if (call.run)
    call.observe("largest router logit", at::scalar_tensor(call.run->statistics.max_abs_logit, at::kDouble));
  call.observe("feed-forward output", y_TD);
  const at::Tensor output_BSD = mixed_BSD + y_TD.view_as(mixed_BSD);
  call.observe("output", output_BSD);
  return output_BSD;
}

ForwardResult Decoder::forward(const at::Tensor& ids_BS, const ForwardOptions& options) const {
  COLLEGIUM_CHECK(ids_BS.dim() == 2 && ids_BS.scalar_type() == at::kLong, "ids must be int64 [B, S]");
  const std::int64_t past = options.cache != nullptr ? options.cache->length : 0;
  const AttentionContext context = attention_context(config_, past, ids_BS.size(1), options.document_ids_BS,
                                                     parameters_[0].value.options());
  if (options.cache != nullptr) options.cache->layers.resize(blocks_.size());

  ForwardResult result;
  at::Tensor x_BSD = embed(value("embed_tokens"), ids_BS, config_.padding_id);
  if (options.observer) options.observer("embedding output", x_BSD);
  const bool recomputed = options.recompute && at::GradMode::is_enabled();
  // With a frozen embedding nothing would require grad, and recompute() hangs the block's gradients on its
  // input.
  if (recomputed && !x_BSD.requires_grad()) x_BSD = x_BSD.detach().requires_grad_(true);
  for (std::size_t layer = 0; layer < blocks_.size(); ++layer) {
    const std::shared_ptr<Block>& block = blocks_[layer];
    std::shared_ptr<moe::LayerRun> run;
    if (block->has_experts) {
      run = std::make_shared<moe::LayerRun>();
      run->context = options.context;
      run->context.num_sequences = ids_BS.size(0);
      run->context.sequence_length = ids_BS.size(1);
      run->context.past_tokens = past;
      run->context.layer = static_cast<std::int64_t>(layer);
      if (!options.replayed_ids.empty()) run->replayed_ids_TK = options.replayed_ids.at(result.layers.size());
      result.layers.push_back(run);
    }
    LayerCache* cache = options.cache != nullptr ? &options.cache->layers[layer] : nullptr;
    const BlockCall call{.attention = context,
                         .cache = cache,
                         .run = run,
                         .layer = static_cast<std::int64_t>(layer),
                         .observer = options.observer};
    const auto function = [this, block, call](const at::Tensor& x) { return run_block(*block, x, call); };
    x_BSD = recomputed ? recompute(function, x_BSD) : function(x_BSD);
  }
  if (options.cache != nullptr) options.cache->length += ids_BS.size(1);
  result.hidden_BSD = rms_norm(x_BSD, value("norm"), config_.norm_eps);
  if (options.observer) options.observer("output of the final norm", result.hidden_BSD);
  return result;
}

const at::Tensor& Decoder::output_matrix() const {
  return value(config_.tie_embeddings ? "embed_tokens" : "lm_head");
}

at::Tensor Decoder::logits(const at::Tensor& hidden) const { return model::linear(hidden, output_matrix()); }

}  // namespace collegium::model
