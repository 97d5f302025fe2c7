// SPDX-License-Identifier: Apache-2.0
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "collegium/base/error.h"
#include "collegium/model/decoder.h"
#include "collegium/model/softmax_loss.h"
#include "collegium/ops/product.h"

namespace collegium::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void add_product(const at::Tensor& a, const at::Tensor& b, at::Tensor& sum) {
  if (a.scalar_type() == sum.scalar_type()) {
    sum.addmm_(a, b);
  } else {
    sum += ops::product(a, b);
  }
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
    const at::Tensor head = head_VD.to(ops::product_dtype(head_VD));  // once, not per chunk
    for (std::int64_t begin = 0; begin < hidden_TD.size(0); begin += kLossChunkTokens) {
      const std::int64_t size = std::min(kLossChunkTokens, hidden_TD.size(0) - begin);
      const at::Tensor chunk_TD = hidden_TD.narrow(0, begin, size);
      at::Tensor logits_TV = ops::product(chunk_TD, head.t());
      loss += softmax_loss(logits_TV, targets_T.narrow(0, begin, size), need_hidden || need_head).sum();
      if (need_hidden) grad_hidden.narrow(0, begin, size).copy_(ops::product(logits_TV, head));
      if (need_head) add_product(logits_TV.t(), chunk_TD, grad_head);
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
      return gradient.defined() ? gradient.mul_(grads[0]).to(dtype) : at::Tensor();
    };
    variable_list gradients = {scaled("hidden"), scaled("head"), {}, {}, {}};
    context->saved_data.clear();  // not kept until the whole graph goes
    return gradients;
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
