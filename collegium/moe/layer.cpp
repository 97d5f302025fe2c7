// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/layer.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <array>
#include <optional>

#include "collegium/moe/experts.h"
#include "collegium/moe/shared_expert.h"

namespace collegium::moe {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// Order of the tensors that autograd sees. Undefined ones are optional weights that the options do not need.
enum Input : std::size_t {
  kX,
  kGate,
  kNoise,
  kGateUp,
  kDown,
  kSharedGateUp,
  kSharedDown,
  kSharedGate,
  kSharedMix,
  kCount
};
using Inputs = std::array<at::Tensor, kCount>;

// Everything the backward pass needs besides the inputs; lives as long as the graph.
struct Saved {
  MoeOptions options;
  std::shared_ptr<Dispatcher> dispatcher;
  std::shared_ptr<LayerRun> run;
  std::shared_ptr<RouterState> router;
  std::shared_ptr<DispatchHandle> handle;
  ExpertsState experts;
  SharedExpertState shared;
  at::Tensor expert_input_TD;
  at::Tensor expert_bias_E;
};

SharedExpertWeights shared_weights(const Inputs& inputs) {
  return {.gate_up_GD = inputs[kSharedGateUp],
          .down_DF = inputs[kSharedDown],
          .gate_1D = inputs[kSharedGate],
          .mix_2D = inputs[kSharedMix]};
}

at::Tensor forward_layer(const Inputs& inputs, Saved& saved) {
  const MoeOptions& options = saved.options;
  LayerRun& run = *saved.run;
  const RouterWeights router{
      .gate_ED = inputs[kGate], .noise_ED = inputs[kNoise], .expert_bias_E = saved.expert_bias_E};
  RouterOutput routed = route(options, router, inputs[kX], run.context, run.replayed_ids_TK);
  saved.router = routed.state;
  saved.expert_input_TD = routed.expert_input_TD;

  const Dispatched dispatched = saved.dispatcher->dispatch(routed.expert_input_TD, routed.routing);
  saved.handle = dispatched.handle;
  const at::Tensor rows_RD =
      experts_forward(dispatched.rows_RD, dispatched.weights_R, dispatched.handle->row_counts_L,
                      inputs[kGateUp], inputs[kDown], saved.experts);
  at::Tensor y_TD = saved.dispatcher->combine(rows_RD, *saved.handle);
  if (options.shared_expert.kind != SharedExpert::kNone) {
    y_TD = shared_expert_forward(options.shared_expert.kind, shared_weights(inputs), saved.expert_input_TD,
                                 y_TD, saved.shared);
  }
  // Under recomputation the run is filled already, and what was read from it must not change under its
  // readers.
  if (!run.routing.expert_ids_TK.defined()) {
    run.routing = std::move(routed.routing);
    run.statistics = std::move(routed.statistics);
  }
  return y_TD;
}

at::Tensor sum_defined(const at::Tensor& a, const at::Tensor& b) { return a.defined() ? a + b : b; }

variable_list backward_layer(const Inputs& inputs, const std::array<bool, kCount>& needs, const Saved& saved,
                             const at::Tensor& grad_y_TD) {
  variable_list gradients(kCount);
  const auto dtype = inputs[kX].scalar_type();
  at::Tensor grad_routed_TD = grad_y_TD;
  at::Tensor grad_expert_input_TD;
  const SharedExpert shared_kind = saved.options.shared_expert.kind;
  if (shared_kind != SharedExpert::kNone) {
    SharedExpertGradients shared = shared_expert_backward(shared_kind, shared_weights(inputs),
                                                          saved.expert_input_TD, saved.shared, grad_y_TD);
    grad_routed_TD = shared.routed_TD;
    grad_expert_input_TD = shared.x_TD;
    gradients[kSharedGateUp] = shared.weights.gate_up_GD;
    gradients[kSharedDown] = shared.weights.down_DF;
    gradients[kSharedGate] = shared.weights.gate_1D;
    gradients[kSharedMix] = shared.weights.mix_2D;
  }
  const at::Tensor grad_rows_RD = saved.dispatcher->combine_backward(grad_routed_TD, *saved.handle);
  ExpertsGradients experts =
      experts_backward(saved.experts, grad_rows_RD, inputs[kGateUp], inputs[kDown],
                       {.rows = needs[kX], .gate_up = needs[kGateUp], .down = needs[kDown]});
  gradients[kGateUp] = experts.gate_up_LGD;
  gradients[kDown] = experts.down_LDF;
  const auto dispatch =
      saved.dispatcher->dispatch_backward(experts.rows_RD, experts.weights_R, *saved.handle);
  const RouterGradients router =
      route_backward(*saved.router, dispatch.weights_TK, saved.run->statistics_gradient);
  gradients[kGate] = router.gate_ED.to(inputs[kGate].scalar_type());
  if (router.noise_ED.defined()) gradients[kNoise] = router.noise_ED.to(inputs[kNoise].scalar_type());
  if (needs[kX]) {
    grad_expert_input_TD = sum_defined(grad_expert_input_TD, dispatch.x_TD).to(router.x_TD.scalar_type());
    const at::Tensor& jitter_TD = input_jitter_TD(*saved.router);
    if (jitter_TD.defined()) grad_expert_input_TD = grad_expert_input_TD * jitter_TD;
    gradients[kX] = (grad_expert_input_TD + router.x_TD).to(dtype);
  }
  return gradients;
}

// Lets autograd's context own what the backward pass needs.
struct Holder final : torch::CustomClassHolder {
  explicit Holder(std::shared_ptr<Saved> what) : saved(std::move(what)) {}
  std::shared_ptr<Saved> saved;
};

class LayerFunction final : public torch::autograd::Function<LayerFunction> {
 public:
  using Optional = std::optional<at::Tensor>;  // autograd takes no undefined tensors

  static Variable forward(AutogradContext* context, const Variable& x, const Variable& gate,
                          const Optional& noise, const Variable& gate_up, const Variable& down,
                          const Optional& shared_gate_up, const Optional& shared_down,
                          const Optional& shared_gate, const Optional& shared_mix,
                          const std::shared_ptr<Saved>& saved) {
    const auto get = [](const Optional& tensor) { return tensor.value_or(at::Tensor()); };
    const Inputs inputs = {x,
                           gate,
                           get(noise),
                           gate_up,
                           down,
                           get(shared_gate_up),
                           get(shared_down),
                           get(shared_gate),
                           get(shared_mix)};
    context->save_for_backward({inputs.begin(), inputs.end()});
    context->saved_data["saved"] = at::IValue::make_capsule(c10::make_intrusive<Holder>(saved));
    return forward_layer(inputs, *saved);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list variables = context->get_saved_variables();
    const auto holder = c10::static_intrusive_pointer_cast<Holder>(context->saved_data["saved"].toCapsule());
    Inputs inputs;
    std::array<bool, kCount> needs{};
    std::size_t edge = 0;  // autograd gives undefined inputs no edge
    for (std::size_t i = 0; i < kCount; ++i) {
      inputs[i] = variables[i];
      needs[i] = inputs[i].defined() && context->needs_input_grad(edge++);
    }
    variable_list gradients = backward_layer(inputs, needs, *holder->saved, grads[0].contiguous());
    gradients.emplace_back();  // of `saved`, which is no tensor
    return gradients;
  }
};

}  // namespace

at::Tensor moe_layer(const MoeOptions& options, const MoeWeights& weights,
                     const std::shared_ptr<Dispatcher>& dispatcher, const at::Tensor& x_TD,
                     const std::shared_ptr<LayerRun>& run) {
  auto saved = std::make_shared<Saved>();
  saved->options = options;
  saved->dispatcher = dispatcher;
  saved->run = run;
  saved->expert_bias_E = weights.router.expert_bias_E;
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
  };
  return LayerFunction::apply(x_TD.contiguous(), weights.router.gate_ED, optional(weights.router.noise_ED),
                              weights.gate_up_EGD, weights.down_EDF, optional(weights.shared_gate_up_GD),
                              optional(weights.shared_down_DF), optional(weights.shared_gate_1D),
                              optional(weights.shared_mix_2D), saved);
}

}  // namespace collegium::moe
