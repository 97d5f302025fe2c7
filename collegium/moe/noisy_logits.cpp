// SPDX-License-Identifier: Apache-2.0
#include "collegium/moe/noisy_logits.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <numbers>

#include "collegium/ops/topk.h"

namespace collegium::moe {

namespace {

constexpr double kMinStd = 1e-2;

}  // namespace

NoisyLogits add_learned_noise(const at::Tensor& clean_TE, const at::Tensor& raw_std_TE,
                              const at::Tensor& normal_TE) {
  NoisyLogits logits{
      .clean_TE = clean_TE, .raw_std_TE = raw_std_TE, .std_TE = {}, .normal_TE = normal_TE, .noisy_TE = {}};
  // softplus as logaddexp(0, z): exact for large |z|, where at::softplus switches to a threshold.
  logits.std_TE = at::logaddexp(raw_std_TE, at::zeros({}, raw_std_TE.options())) + kMinStd;
  logits.noisy_TE = clean_TE + normal_TE * logits.std_TE;
  return logits;
}

SmoothLoad smooth_load(const NoisyLogits& logits, std::int64_t top_k) {
  const std::int64_t num_experts = logits.clean_TE.size(1);
  if (top_k >= num_experts)
    return {.probability_TE = at::ones_like(logits.clean_TE), .z_TE = {}, .threshold_id_TE = {}};
  const at::Tensor best = ops::topk_stable(logits.noisy_TE, top_k + 1).to(at::kLong);
  at::Tensor inside_TE = at::zeros_like(logits.clean_TE, at::kBool);
  inside_TE.scatter_(1, best.narrow(1, 0, top_k), true);
  SmoothLoad load;
  load.threshold_id_TE = at::where(inside_TE, best.narrow(1, top_k, 1), best.narrow(1, top_k - 1, 1));
  const at::Tensor threshold_TE = logits.noisy_TE.gather(1, load.threshold_id_TE);
  load.z_TE = (logits.clean_TE - threshold_TE) / logits.std_TE;
  load.probability_TE = 0.5 * (1 + at::erf(load.z_TE / std::numbers::sqrt2));
  return load;
}

NoisyGradients noisy_backward(const NoisyLogits& logits, const SmoothLoad& load,
                              const at::Tensor& grad_noisy_TE, const at::Tensor& grad_probability_TE) {
  at::Tensor grad_noisy = grad_noisy_TE;
  at::Tensor grad_clean = at::zeros_like(logits.clean_TE);
  at::Tensor grad_std = at::zeros_like(logits.std_TE);
  if (grad_probability_TE.defined() && load.z_TE.defined()) {
    const double normalizer = 1.0 / std::sqrt(2.0 * std::numbers::pi);
    const at::Tensor density_TE = normalizer * at::exp(-0.5 * load.z_TE * load.z_TE);
    const at::Tensor slope_TE = grad_probability_TE * density_TE / logits.std_TE;
    grad_clean = slope_TE;
    grad_std = -slope_TE * load.z_TE;
    // Several experts share a threshold; scatter_add over one row on one thread is deterministic on the CPU.
    grad_noisy = grad_noisy.scatter_add(1, load.threshold_id_TE, -slope_TE);
  }
  grad_clean = grad_clean + grad_noisy;
  grad_std = grad_std + grad_noisy * logits.normal_TE;
  return {.clean_TE = grad_clean, .raw_std_TE = grad_std * at::sigmoid(logits.raw_std_TE)};
}

}  // namespace collegium::moe
