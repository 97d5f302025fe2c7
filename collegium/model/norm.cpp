// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/norm.h"

#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>

namespace collegium::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor widen(const at::Tensor& tensor) { return tensor.to(at::toOpMathType(tensor.scalar_type())); }

// One node instead of seven: autograd would keep a wide copy of x at every step of the formula.
class RmsNormFunction final : public torch::autograd::Function<RmsNormFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            double eps) {
    const at::Tensor wide = widen(x);
    const at::Tensor scale = at::rsqrt((wide * wide).mean(-1, true) + eps);
    const at::Tensor normalized = (wide * scale).to(x.scalar_type());
    context->save_for_backward({normalized, weight, scale});
    return normalized * weight;
  }

  // With n = x r, r = (mean(x^2) + eps)^(-1/2): dx = r (g - n mean(g n)), g = dy * weight.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor normalized = widen(saved[0]);
    const at::Tensor grad_y = widen(grads[0]);
    const at::Tensor grad_normalized = grad_y * widen(saved[1]);
    const at::Tensor mean = (grad_normalized * normalized).mean(-1, true);
    const at::Tensor grad_x = saved[2] * (grad_normalized - normalized * mean);
    at::Tensor grad_weight;
    if (context->needs_input_grad(1)) {
      grad_weight =
          (grad_y * normalized).reshape({-1, normalized.size(-1)}).sum(0).to(saved[1].scalar_type());
    }
    return {grad_x.to(saved[0].scalar_type()), grad_weight, at::Tensor()};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return RmsNormFunction::apply(x, weight, eps);
}

}  // namespace collegium::model
