// SPDX-License-Identifier: Apache-2.0
#include "collegium/optim/master_weights.h"

#include <ATen/ATen.h>

#include <cmath>
#include <optional>

#include "collegium/base/error.h"

namespace collegium::optim {

namespace {

const char* kind_name(model::ParameterKind kind) {
  switch (kind) {
    case model::ParameterKind::kExpert:
      return kExpertKind;
    case model::ParameterKind::kRouter:
      return "router";
    case model::ParameterKind::kNorm:
      return "norm";
    case model::ParameterKind::kEmbedding:
      return "embedding";
    case model::ParameterKind::kDense:
    case model::ParameterKind::kBuffer:
      break;
  }
  return "dense";
}

std::string explain_non_finite(const Slot& slot) {
  if (at::isfinite(slot.gradient).all().item<bool>())
    return fmt::format("the norm of the gradient of {} is not finite: its values are too large", slot.name);
  std::string where = slot.name;
  if (slot.kind == model::ParameterKind::kExpert) {
    for (std::int64_t expert = 0; expert < slot.gradient.size(0); ++expert) {
      if (at::isfinite(slot.gradient[expert]).all().item<bool>()) continue;
      where += fmt::format(" (expert {})", slot.first_expert + expert);
      break;
    }
  }
  return fmt::format("the gradient of {} is not finite", where);
}

// One tensor of zeros, of which every (expert's) slot's gradient is a part.
at::Tensor allocate_gradients(std::vector<Slot>& slots, bool experts) {
  const auto wanted = [experts](const Slot& slot) {
    return (slot.kind == model::ParameterKind::kExpert) == experts;
  };
  std::int64_t size = 0;
  at::TensorOptions options = at::kFloat;
  for (const Slot& slot : slots) {
    options = slot.master.options();
    if (wanted(slot)) size += slot.master.numel();
  }
  const at::Tensor all = at::zeros({size}, options);
  std::int64_t begin = 0;
  for (Slot& slot : slots) {
    if (!wanted(slot)) continue;
    slot.gradient = all.narrow(0, begin, slot.master.numel()).view(slot.master.sizes());
    begin += slot.master.numel();
  }
  return all;
}

}  // namespace

MasterWeights::MasterWeights(const std::vector<model::Parameter>& parameters) {
  const at::NoGradGuard no_grad;
  for (const model::Parameter& parameter : parameters) {
    if (!parameter.trainable) continue;
    const auto dtype = parameter.value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    Slot slot{.name = parameter.name,
              .kind = parameter.kind,
              .first_expert = parameter.first_expert,
              .value = parameter.value,
              .master = parameter.value.detach().to(dtype),
              .gradient = {},
              .first_moment = {},
              .second_moment = {},
              .frozen = parameter.frozen};
    slot.first_moment = at::zeros_like(slot.master);
    slot.second_moment = at::zeros_like(slot.master);
    slots_.push_back(std::move(slot));
  }
  dense_gradients_ = allocate_gradients(slots_, /*experts=*/false);
  expert_gradients_ = allocate_gradients(slots_, /*experts=*/true);
}

void MasterWeights::accumulate() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    at::Tensor& gradient = slot.value.mutable_grad();
    if (!gradient.defined()) continue;
    slot.gradient.add_(gradient);
    gradient.reset();
  }
}

void MasterWeights::clear_frozen_gradients() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    if (slot.frozen.defined()) slot.gradient.masked_fill_(slot.frozen, 0);
  }
}

void MasterWeights::write_values() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) slot.value.copy_(slot.master);
}

GradientSquares gradient_squares(const std::vector<Slot>& slots) {
  GradientSquares squares;
  std::optional<std::size_t> not_finite;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    const double part =
        at::linalg_vector_norm(slot.gradient, 2, std::nullopt, false, at::kDouble).item<double>();
    if (!std::isfinite(part)) not_finite = i;
    squares[kind_name(slot.kind)] += part * part;
  }
  if (not_finite) throw NonFiniteGradient(explain_non_finite(slots[*not_finite]), *not_finite);
  return squares;
}

GradientNorm gradient_norm(const GradientSquares& squares) {
  GradientNorm norm;
  double total = 0.0;
  for (const auto& [kind, value] : squares) {
    norm.by_kind[kind] = std::sqrt(value);
    total += value;
  }
  norm.total = std::sqrt(total);
  return norm;
}

}  // namespace collegium::optim
