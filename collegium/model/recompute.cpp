// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/recompute.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include "collegium/base/error.h"

namespace collegium::model {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Block = std::function<at::Tensor(const at::Tensor&)>;

struct Holder final : torch::CustomClassHolder {
  explicit Holder(Block what) : block(std::move(what)) {}
  Block block;
};

class RecomputeFunction final : public torch::autograd::Function<RecomputeFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const Block& block) {
    context->save_for_backward({x});
    context->saved_data["block"] = at::IValue::make_capsule(c10::make_intrusive<Holder>(block));
    return block(x);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto holder = c10::static_intrusive_pointer_cast<Holder>(context->saved_data["block"].toCapsule());
    const at::AutoGradMode with_grad(true);
    at::Tensor x = context->get_saved_variables()[0].detach().requires_grad_(true);
    torch::autograd::backward({holder->block(x)}, {grads[0]});
    return {x.grad(), at::Tensor()};
  }
};

}  // namespace

at::Tensor recompute(const Block& block, const at::Tensor& x) {
  COLLEGIUM_CHECK(x.requires_grad(), "recompute() needs an input that requires grad");
  return RecomputeFunction::apply(x, block);
}

}  // namespace collegium::model
