// SPDX-License-Identifier: Apache-2.0
#include "collegium/optim/master_weights.h"

#include <ATen/ATen.h>

#include <cmath>

#include "collegium/base/error.h"

namespace collegium::optim {

namespace {

const char* kind_name(model::ParameterKind kind) {
  switch (kind) {
    case model::ParameterKind::kExpert:
      return "expert";
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

[[noreturn]] void throw_not_finite(const Slot& slot) {
  std::string where = slot.name;
  if (slot.kind == model::ParameterKind::kExpert) {
    for (std::int64_t expert = 0; expert < slot.gradient.size(0); ++expert) {
      if (at::isfinite(slot.gradient[expert]).all().item<bool>()) continue;
      where += fmt::format(" (expert {})", expert);
      break;
    }
  }
  throw Error(fmt::format("the gradient of {} is not finite", where));
}

}  // namespace

MasterWeights::MasterWeights(const std::vector<model::Parameter>& parameters) {
  const at::NoGradGuard no_grad;
  for (const model::Parameter& parameter : parameters) {
    if (!parameter.trainable) continue;
    const auto dtype = parameter.value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    Slot slot{.name = parameter.name,
              .kind = parameter.kind,
              .value = parameter.value,
              .master = parameter.value.detach().to(dtype),
              .gradient = {},
              .first_moment = {},
              .second_moment = {}};
    slot.gradient = at::zeros_like(slot.master);
    slot.first_moment = at::zeros_like(slot.master);
    slot.second_moment = at::zeros_like(slot.master);
    slots_.push_back(std::move(slot));
  }
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

void MasterWeights::write_values() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) slot.value.copy_(slot.master);
}

GradientNorm gradient_norm(const std::vector<Slot>& slots) {
  GradientNorm norm;
  double square = 0.0;
  std::map<std::string, double> squares;
  for (const Slot& slot : slots) {
    const double part =
        at::linalg_vector_norm(slot.gradient, 2, std::nullopt, false, at::kDouble).item<double>();
    if (!std::isfinite(part)) throw_not_finite(slot);
    square += part * part;
    squares[kind_name(slot.kind)] += part * part;
  }
  norm.total = std::sqrt(square);
  for (const auto& [kind, value] : squares) norm.by_kind[kind] = std::sqrt(value);
  return norm;
}

}  // namespace collegium::optim
