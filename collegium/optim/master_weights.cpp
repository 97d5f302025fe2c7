// SPDX-License-Identifier: Apache-2.0
#include "collegium/optim/master_weights.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

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

namespace {

COLLEGIUM_CLONES double squares_of(const float* values, std::int64_t count) {
  return ops::row_math::lane_sum<double>(count, [values](std::int64_t i) {
    return static_cast<double>(values[i]) * static_cast<double>(values[i]);
  });
}
COLLEGIUM_CLONES double squares_of(const double* values, std::int64_t count) {
  return ops::row_math::lane_sum<double>(count, [values](std::int64_t i) { return values[i] * values[i]; });
}

// In float64, over fixed ranges that are added in their order: the same for any number of threads.
double sum_of_squares(const at::Tensor& gradient) {
  constexpr std::int64_t kRange = std::int64_t{1} << 16;
  const std::int64_t count = gradient.numel();
  std::vector<double> parts(static_cast<std::size_t>((count + kRange - 1) / kRange));
  AT_DISPATCH_FLOATING_TYPES(gradient.scalar_type(), "sum_of_squares", [&] {
    const auto* values = gradient.const_data_ptr<scalar_t>();
    at::parallel_for(0, static_cast<std::int64_t>(parts.size()), 1,
                     [&](std::int64_t begin, std::int64_t end) {
                       for (std::int64_t part = begin; part < end; ++part) {
                         const std::int64_t first = part * kRange;
                         parts[static_cast<std::size_t>(part)] =
                             squares_of(values + first, std::min(kRange, count - first));
                       }
                     });
  });
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

}  // namespace

GradientSquares gradient_squares(const std::vector<Slot>& slots) {
  GradientSquares squares;
  std::optional<std::size_t> not_finite;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const Slot& slot = slots[i];
    const double part = sum_of_squares(slot.gradient);
    if (!std::isfinite(part)) not_finite = i;
    squares[kind_name(slot.kind)] += part;
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
