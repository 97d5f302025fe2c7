// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/dense_ffn.h"

#include <torch/csrc/autograd/custom_function.h>

#include "collegium/model/linear.h"
#include "collegium/ops/swiglu.h"

namespace collegium::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class SwigluFunction final : public torch::autograd::Function<SwigluFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate_up_TG) {
    context->save_for_backward({gate_up_TG});
    return ops::swiglu(gate_up_TG, {});
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    return {ops::swiglu_backward(grads[0], context->get_saved_variables()[0], {}).gate_up_RG};
  }
};

}  // namespace

at::Tensor dense_ffn(const at::Tensor& x_TD, const at::Tensor& gate_up_GD, const at::Tensor& down_DF) {
  return model::linear(SwigluFunction::apply(model::linear(x_TD, gate_up_GD)), down_DF);
}

}  // namespace collegium::model
