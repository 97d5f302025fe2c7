// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/layer.h"

#include <ATen/OpMathType.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <array>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/moe/capacity.h"
#include "collegium/moe/shared_expert.h"
#include "collegium/ops/expert_mlp.h"

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

// A run of consecutive tokens that travels and is computed by itself.
struct Chunk {
  std::int64_t begin = 0;
  std::int64_t tokens = 0;
  std::shared_ptr<DispatchHandle> handle;
  ops::ExpertsKept experts;

  at::Tensor of(const at::Tensor& all_TX) const { return all_TX.narrow(0, begin, tokens); }
};

// Everything the backward pass needs besides the inputs; lives as long as the graph.
struct Saved {
  MoeOptions options;
  ExpertTransport transport;
  std::shared_ptr<LayerRun> run;
  std::shared_ptr<RouterState> router;
  std::vector<Chunk> chunks;
  SharedExpertState shared;
  at::Tensor expert_input_TD;
  at::Tensor expert_bias_E;
};

void begin_stages(const LayerRun& run) {
  if (run.stage_times != nullptr) run.stage_times->begin();
}
void end_stage(const LayerRun& run, Stage stage) {
  if (run.stage_times != nullptr) run.stage_times->end(stage);
}

ops::ExpertWeights expert_weights(const Inputs& inputs) {
  return {.gate_up_EGD = inputs[kGateUp], .down_EDF = inputs[kDown]};
}

SharedExpertWeights shared_weights(const Inputs& inputs) {
  return {.gate_up_GD = inputs[kSharedGateUp],
          .down_DF = inputs[kSharedDown],
          .gate_1D = inputs[kSharedGate],
          .mix_2D = inputs[kSharedMix]};
}

// Equal shares, as many on every rank, empty where there are fewer tokens than chunks.
std::vector<Chunk> cut_into_chunks(std::int64_t num_tokens, std::int64_t num_chunks) {
  std::vector<Chunk> chunks(static_cast<std::size_t>(num_chunks));
  for (std::int64_t i = 0; i < num_chunks; ++i) {
    Chunk& chunk = chunks[static_cast<std::size_t>(i)];
    chunk.begin = num_tokens * i / num_chunks;
    chunk.tokens = num_tokens * (i + 1) / num_chunks - chunk.begin;
  }
  return chunks;
}

std::int64_t capacity_rows(const MoeOptions& options, const TokenContext& context) {
  const CapacityOptions& capacity = options.capacity;
  const bool drops =
      capacity.drop_policy != DropPolicy::kNone && (context.training || capacity.drop_in_evaluation);
  if (!drops) return -1;
  return expert_capacity(options, capacity.group_sequences * context.sequence_length) *
         (context.num_sequences / capacity.group_sequences);
}

void plan_chunks(const Routing& routing, Saved& saved) {
  saved.chunks = cut_into_chunks(routing.expert_ids_TK.size(0), saved.transport.overlap.chunks);
  std::vector<at::Tensor> ids;
  ids.reserve(saved.chunks.size());
  for (const Chunk& chunk : saved.chunks) ids.push_back(chunk.of(routing.expert_ids_TK));
  const TokenContext& context = saved.run->context;
  const auto handles = saved.transport.dispatcher->plan(
      {.chunk_ids_TK = ids,
       .capacity_rows = capacity_rows(saved.options, context),
       .where = {.step = context.step, .layer = context.layer, .phase = {}}});
  for (std::size_t i = 0; i < handles.size(); ++i) saved.chunks[i].handle = handles[i];
}

// Chunk i + 1 arrives while chunk i is computed, and results leave while the next chunk is computed.
at::Tensor run_experts(const Inputs& inputs, const Routing& routing, Saved& saved,
                       const std::function<void()>& meanwhile) {
  Dispatcher& dispatcher = *saved.transport.dispatcher;
  std::vector<Pending<DispatchedRows>> arriving;
  std::vector<Pending<at::Tensor>> leaving;
  const auto start = [&](std::size_t i) {
    const Chunk& chunk = saved.chunks[i];
    arriving.push_back(
        dispatcher.dispatch(chunk.of(saved.expert_input_TD), chunk.of(routing.weights_TK), chunk.handle));
  };
  start(0);
  end_stage(*saved.run, Stage::kDispatch);
  if (meanwhile) meanwhile();
  for (std::size_t i = 0; i < saved.chunks.size(); ++i) {
    const DispatchedRows dispatched = arriving[i].wait();
    if (i + 1 < saved.chunks.size()) start(i + 1);
    end_stage(*saved.run, Stage::kDispatch);
    Chunk& chunk = saved.chunks[i];
    const at::Tensor rows_RD = ops::expert_mlp(
        dispatched.rows, dispatched.weights_R, chunk.handle->row_counts_L, expert_weights(inputs),
        chunk.experts, dispatcher.result_rows(dispatched.rows.values_XD, chunk.handle));
    end_stage(*saved.run, Stage::kExperts);
    leaving.push_back(dispatcher.combine(rows_RD, chunk.handle));
    end_stage(*saved.run, Stage::kCombine);
  }
  std::vector<at::Tensor> y;
  y.reserve(leaving.size());
  for (Pending<at::Tensor>& part : leaving) y.push_back(part.wait());
  at::Tensor y_TD = y.size() == 1 ? y[0] : at::cat(y);
  end_stage(*saved.run, Stage::kCombine);
  return y_TD;
}

at::Tensor forward_layer(const Inputs& inputs, Saved& saved) {
  const MoeOptions& options = saved.options;
  LayerRun& run = *saved.run;
  begin_stages(run);
  const RouterWeights router{
      .gate_ED = inputs[kGate], .noise_ED = inputs[kNoise], .expert_bias_E = saved.expert_bias_E};
  RouterOutput routed = route(options, router, inputs[kX], run.context, run.replayed_ids_TK);
  saved.router = routed.state;
  saved.expert_input_TD = routed.expert_input_TD;
  end_stage(run, Stage::kRouter);
  plan_chunks(routed.routing, saved);
  end_stage(run, Stage::kPlan);

  const SharedExpert shared_kind = options.shared_expert.kind;
  const auto run_shared = [&] {
    shared_expert_forward(shared_kind, shared_weights(inputs), saved.expert_input_TD, saved.shared);
    end_stage(run, Stage::kSharedExpert);
  };
  const bool has_shared = shared_kind != SharedExpert::kNone;
  const bool during_dispatch = has_shared && saved.transport.overlap.shared_expert;
  at::Tensor y_TD = run_experts(inputs, routed.routing, saved,
                                during_dispatch ? std::function<void()>(run_shared) : nullptr);
  if (has_shared && !during_dispatch) run_shared();
  if (has_shared) {
    y_TD = join_shared_expert(shared_kind, y_TD, saved.shared);
    end_stage(run, Stage::kSharedExpert);
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

// A chunk's share of a weight gradient; several are added in fp32 (fp64 for fp64) and rounded once.
void add_share(const at::Tensor& share, bool only_one, at::Tensor& sum) {
  if (!share.defined()) return;
  if (only_one) {
    sum = share;
  } else if (sum.defined()) {
    sum.add_(share);
  } else {
    sum = share.to(at::toOpMathType(share.scalar_type()), /*non_blocking=*/false, /*copy=*/true);
  }
}

// Gradients that the experts' backward pass gives: of tokens and weights per chunk, of the experts' weights.
DispatchGradients run_experts_backward(const Inputs& inputs, const ops::ExpertNeeds& needs,
                                       const Saved& saved, const at::Tensor& grad_routed_TD,
                                       const std::function<void()>& meanwhile, variable_list& gradients) {
  Dispatcher& dispatcher = *saved.transport.dispatcher;
  const bool one_chunk = saved.chunks.size() == 1;
  const bool overlapped = saved.transport.overlap.weight_gradients;
  std::vector<Pending<ops::RowSource>> arriving;
  std::vector<DispatchGradients> parts;
  std::optional<Pending<DispatchGradients>> leaving;
  const auto start = [&](std::size_t i) {
    const Chunk& chunk = saved.chunks[i];
    arriving.push_back(dispatcher.combine_backward(chunk.of(grad_routed_TD), chunk.handle));
  };
  start(0);
  end_stage(*saved.run, Stage::kCombineBackward);
  if (meanwhile) meanwhile();
  for (std::size_t i = 0; i < saved.chunks.size(); ++i) {
    const Chunk& chunk = saved.chunks[i];
    ops::ExpertMlpBackward backward(chunk.experts, expert_weights(inputs), arriving[i].wait(), needs);
    if (i + 1 < saved.chunks.size()) start(i + 1);
    end_stage(*saved.run, Stage::kCombineBackward);
    ops::ExpertRowGradients rows =
        backward.rows(overlapped ? ops::WeightGradients::kAfterRows : ops::WeightGradients::kWithRows,
                      needs.rows ? dispatcher.result_rows(grad_routed_TD, chunk.handle) : at::Tensor());
    end_stage(*saved.run, Stage::kExpertRowsBackward);
    if (leaving) parts.push_back(leaving->wait());
    // Not kept here: the weights' gradients need the memory.
    leaving.emplace(dispatcher.dispatch_backward(std::exchange(rows.x_RD, {}), rows.weights_R, chunk.handle));
    if (!overlapped) {
      parts.push_back(leaving->wait());
      leaving.reset();
    }
    end_stage(*saved.run, Stage::kDispatchBackward);
    const ops::ExpertWeightGradients weights = backward.weights();
    add_share(weights.gate_up_EGD, one_chunk, gradients[kGateUp]);
    add_share(weights.down_EDF, one_chunk, gradients[kDown]);
    end_stage(*saved.run, Stage::kExpertWeightsBackward);
  }
  if (leaving) parts.push_back(leaving->wait());
  end_stage(*saved.run, Stage::kDispatchBackward);
  if (one_chunk) return parts[0];
  std::vector<at::Tensor> x;
  std::vector<at::Tensor> weights;
  for (const DispatchGradients& part : parts) {
    if (part.x_TD.defined()) x.push_back(part.x_TD);
    weights.push_back(part.weights_TK);
  }
  return {.x_TD = x.empty() ? at::Tensor() : at::cat(x), .weights_TK = at::cat(weights)};
}

variable_list backward_layer(const Inputs& inputs, const std::array<bool, kCount>& needs, const Saved& saved,
                             const at::Tensor& grad_y_TD) {
  const at::NoGradGuard no_grad;
  begin_stages(*saved.run);
  variable_list gradients(kCount);
  const auto dtype = inputs[kX].scalar_type();
  const SharedExpert shared_kind = saved.options.shared_expert.kind;
  const bool has_shared = shared_kind != SharedExpert::kNone;
  SharedExpertGradients shared;
  const auto run_shared = [&] {
    shared = shared_expert_backward(
        shared_kind, shared_weights(inputs), saved.expert_input_TD, saved.shared, grad_y_TD,
        {.rows = needs[kX], .gate_up = needs[kSharedGateUp], .down = needs[kSharedDown]});
    end_stage(*saved.run, Stage::kSharedExpertBackward);
  };
  const bool during_combine = has_shared && saved.transport.overlap.shared_expert;
  if (has_shared && !during_combine) run_shared();
  const at::Tensor grad_routed_TD =
      has_shared ? routed_gradient(shared_kind, saved.shared, grad_y_TD) : grad_y_TD;
  const DispatchGradients dispatch = run_experts_backward(
      inputs, {.rows = needs[kX], .gate_up = needs[kGateUp], .down = needs[kDown]}, saved, grad_routed_TD,
      during_combine ? std::function<void()>(run_shared) : nullptr, gradients);
  gradients[kSharedGateUp] = shared.weights.gate_up_GD;
  gradients[kSharedDown] = shared.weights.down_DF;
  gradients[kSharedGate] = shared.weights.gate_1D;
  gradients[kSharedMix] = shared.weights.mix_2D;
  for (const Input expert : {kGateUp, kDown}) {
    if (gradients[expert].defined()) gradients[expert] = gradients[expert].to(dtype);
  }
  RouterGradients router = route_backward(*saved.router, dispatch.weights_TK, saved.run->statistics_gradient,
                                          needs[kX] ? sum_defined(shared.x_TD, dispatch.x_TD) : at::Tensor());
  gradients[kGate] = router.gate_ED.to(inputs[kGate].scalar_type());
  if (router.noise_ED.defined()) gradients[kNoise] = router.noise_ED.to(inputs[kNoise].scalar_type());
  if (needs[kX]) gradients[kX] = std::move(router.x_TD);
  end_stage(*saved.run, Stage::kRouterBackward);
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
    // Autograd frees its own tensors after each node, but what hangs on saved_data only with the whole graph:
    // all layers' rows would stay while gradients grow.
    const std::shared_ptr<Saved> saved = std::exchange(holder->saved, nullptr);
    COLLEGIUM_CHECK(saved != nullptr, "a second backward pass through one MoE layer; its rows are gone");
    variable_list gradients = backward_layer(inputs, needs, *saved, grads[0].contiguous());
    gradients.emplace_back();  // of `saved`, which is no tensor
    return gradients;
  }
};

}  // namespace

at::Tensor moe_layer(const MoeOptions& options, const MoeWeights& weights, const ExpertTransport& transport,
                     const at::Tensor& x_TD, const std::shared_ptr<LayerRun>& run) {
  auto saved = std::make_shared<Saved>();
  saved->options = options;
  saved->transport = transport;
  saved->run = run;
  saved->expert_bias_E = weights.router.expert_bias_E;
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
  };
  return LayerFunction::apply(x_TD.contiguous(), weights.router.gate_ED, optional(weights.router.noise_ED),
                              weights.gate_up_LGD, weights.down_LDF, optional(weights.shared_gate_up_GD),
                              optional(weights.shared_down_DF), optional(weights.shared_gate_1D),
                              optional(weights.shared_mix_2D), saved);
}

}  // namespace collegium::moe
