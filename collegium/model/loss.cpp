// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "collegium/base/error.h"
#include "collegium/model/decoder.h"

namespace collegium::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Tokens whose logits exist at one time: 1024 x 8192 in fp32 are 32 MiB, about the size of a shared cache.
constexpr std::int64_t kChunkTokens = 1024;
constexpr std::int64_t kNoTarget = -100;

struct ChunkResult {
  at::Tensor loss;
  at::Tensor grad_hidden_TD;
  at::Tensor grad_head_VD;
};

// Cross-entropy of some tokens and, when wanted, its gradients: softmax - one_hot(target), through the output
// matrix.
ChunkResult chunk_loss(const at::Tensor& hidden_TD, const at::Tensor& head_VD, const at::Tensor& targets_T,
                       bool need_hidden, bool need_head) {
  const auto dtype = hidden_TD.scalar_type();
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor log_probs_TV = at::log_softmax(at::mm(hidden_TD, head_VD.t()), 1, wide);
  const at::Tensor has_target_T1 = (targets_T != kNoTarget).unsqueeze(1);
  const at::Tensor safe_T1 = targets_T.unsqueeze(1).masked_fill(has_target_T1.logical_not(), 0);
  ChunkResult result;
  result.loss = -log_probs_TV.gather(1, safe_T1).masked_fill(has_target_T1.logical_not(), 0.0).sum();
  if (!need_hidden && !need_head) return result;
  at::Tensor grad_TV = log_probs_TV.exp_();
  grad_TV.scatter_add_(1, safe_T1, at::full({1, 1}, -1.0, grad_TV.options()).expand_as(safe_T1));
  grad_TV.masked_fill_(has_target_T1.logical_not(), 0.0);
  const at::Tensor grad_logits_TV = grad_TV.to(dtype);
  if (need_hidden) result.grad_hidden_TD = at::mm(grad_logits_TV, head_VD);
  if (need_head) result.grad_head_VD = at::mm(grad_logits_TV.t(), hidden_TD).to(wide);
  return result;
}

// Gradients are computed with the loss, chunk by chunk, so that [T, V] never exists as a whole.
class CrossEntropyFunction final : public torch::autograd::Function<CrossEntropyFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden_TD, const at::Tensor& head_VD,
                            const at::Tensor& targets_T, bool need_hidden, bool need_head) {
    const auto wide = hidden_TD.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor loss = at::zeros({}, hidden_TD.options().dtype(at::kDouble));
    at::Tensor grad_hidden = need_hidden ? at::empty_like(hidden_TD) : at::Tensor();
    at::Tensor grad_head =
        need_head ? at::zeros(head_VD.sizes(), head_VD.options().dtype(wide)) : at::Tensor();
    for (std::int64_t begin = 0; begin < hidden_TD.size(0); begin += kChunkTokens) {
      const std::int64_t size = std::min(kChunkTokens, hidden_TD.size(0) - begin);
      const ChunkResult chunk = chunk_loss(hidden_TD.narrow(0, begin, size), head_VD,
                                           targets_T.narrow(0, begin, size), need_hidden, need_head);
      loss += chunk.loss;
      if (need_hidden) grad_hidden.narrow(0, begin, size).copy_(chunk.grad_hidden_TD);
      if (need_head) grad_head += chunk.grad_head_VD;
    }
    context->saved_data["hidden"] = grad_hidden;
    context->saved_data["head"] = grad_head;
    context->saved_data["dtype"] = static_cast<std::int64_t>(hidden_TD.scalar_type());
    return loss.to(wide);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto dtype = static_cast<at::ScalarType>(context->saved_data["dtype"].toInt());
    const auto scaled = [&](const char* name) {
      const at::IValue& value = context->saved_data[name];
      const at::Tensor gradient = value.isTensor() ? value.toTensor() : at::Tensor();
      return gradient.defined() ? (gradient * grads[0]).to(dtype) : at::Tensor();
    };
    return {scaled("hidden"), scaled("head"), {}, {}, {}};
  }
};

}  // namespace

at::Tensor cross_entropy_sum(const Decoder& decoder, const at::Tensor& hidden_BSD,
                             const at::Tensor& targets_BS) {
  const at::Tensor hidden_TD = hidden_BSD.reshape({-1, hidden_BSD.size(-1)});
  const at::Tensor targets_T = targets_BS.reshape({-1});
  COLLEGIUM_CHECK(hidden_TD.size(0) == targets_T.size(0), "{} hidden rows for {} targets", hidden_TD.size(0),
                  targets_T.size(0));
  const at::Tensor& head_VD = decoder.output_matrix();
  const bool grad = at::GradMode::is_enabled();
  return CrossEntropyFunction::apply(hidden_TD, head_VD, targets_T, grad && hidden_TD.requires_grad(),
                                     grad && head_VD.requires_grad());
}

}  // namespace collegium::model
