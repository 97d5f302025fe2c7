// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/linear.h"

#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include "collegium/ops/product.h"

namespace collegium::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class LinearFunction final : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x_TI, const at::Tensor& w_OI) {
    // What only a frozen factor's gradient needs is not kept.
    context->save_for_backward(
        {w_OI.requires_grad() ? x_TI : at::Tensor(), x_TI.requires_grad() ? w_OI : at::Tensor()});
    return ops::product(x_TI, w_OI.t());
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& grad_TO = grads[0];
    return {context->needs_input_grad(0) ? ops::product(grad_TO, saved[1]) : at::Tensor(),
            context->needs_input_grad(1) ? ops::product(grad_TO.t(), saved[0]) : at::Tensor()};
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& w_OI) {
  if (!ops::products_are_own(x)) return at::linear(x, w_OI);
  const at::Tensor y_TO = LinearFunction::apply(x.reshape({-1, x.size(-1)}), w_OI);
  auto shape = x.sizes().vec();
  shape.back() = w_OI.size(0);
  return y_TO.view(shape);
}

}  // namespace collegium::model
