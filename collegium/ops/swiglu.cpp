// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/swiglu.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sigmoid.h>

#include "collegium/base/error.h"
#include "collegium/ops/swiglu_rows.h"

namespace collegium::ops {

namespace {

constexpr std::int64_t kSwigluRowsPerTask = 16;

at::Tensor column(const at::Tensor& weights_R) { return weights_R.unsqueeze(1); }

void check_shapes(const at::Tensor& gate_up_RG, const at::Tensor& weights_R) {
  COLLEGIUM_CHECK(gate_up_RG.dim() == 2 && gate_up_RG.size(1) % 2 == 0, "gate_up must be [R, 2F]");
  COLLEGIUM_CHECK(!weights_R.defined() || weights_R.numel() == gate_up_RG.size(0), "{} weights for {} rows",
                  weights_R.numel(), gate_up_RG.size(0));
}

}  // namespace

at::Tensor inner_weights(const at::Tensor& weights_R, at::ScalarType dtype) {
  return weights_R.defined() ? weights_R.to(at::toOpMathType(dtype)).contiguous() : at::Tensor();
}

void swiglu_into(const at::Tensor& gate_up_RG, const at::Tensor& weights_R, const at::Tensor& out_RF) {
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, gate_up_RG.scalar_type(), "swiglu", [&] {
    const auto whole = whole_swiglu<scalar_t>(gate_up_RG, weights_R, out_RF);
    at::parallel_for(0, whole.rows, kSwigluRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      swiglu_part(whole.part(begin, end - begin, 0, whole.columns));
    });
  });
}

at::Tensor swiglu(const at::Tensor& gate_up_RG, const at::Tensor& weights_R) {
  check_shapes(gate_up_RG, weights_R);
  if (!gate_up_RG.is_cpu()) return swiglu_aten(gate_up_RG, weights_R);
  at::Tensor out_RF = at::empty({gate_up_RG.size(0), gate_up_RG.size(1) / 2}, gate_up_RG.options());
  swiglu_into(gate_up_RG.contiguous(), inner_weights(weights_R, gate_up_RG.scalar_type()), out_RF);
  return out_RF;
}

void swiglu_backward_into(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                          const at::Tensor& weights_R, const SwigluGradients& out,
                          const at::Tensor& activation_RF) {
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, gate_up_RG.scalar_type(), "swiglu_backward", [&] {
    const auto whole = whole_swiglu_backward<scalar_t>(grad_RF, gate_up_RG, weights_R, out, activation_RF);
    at::parallel_for(0, whole.forward.rows, kSwigluRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      swiglu_backward_part(whole.part(begin, end - begin, 0, whole.forward.columns));
    });
  });
}

SwigluGradients swiglu_backward(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                                const at::Tensor& weights_R) {
  check_shapes(gate_up_RG, weights_R);
  if (!gate_up_RG.is_cpu()) return swiglu_backward_aten(grad_RF, gate_up_RG, weights_R);
  const at::Tensor hidden = gate_up_RG.contiguous();
  const at::Tensor weights = inner_weights(weights_R, hidden.scalar_type());
  SwigluGradients result{.gate_up_RG = at::empty_like(hidden), .weights_R = {}};
  if (weights.defined()) result.weights_R = at::empty_like(weights);
  swiglu_backward_into(grad_RF.contiguous(), hidden, weights, result, {});
  if (weights.defined()) result.weights_R = result.weights_R.to(weights_R.scalar_type());
  return result;
}

at::Tensor swiglu_aten(const at::Tensor& gate_up_RG, const at::Tensor& weights_R) {
  const at::Tensor wide = gate_up_RG.to(at::toOpMathType(gate_up_RG.scalar_type()));
  const std::int64_t width = wide.size(1) / 2;
  const at::Tensor gate = wide.narrow(1, 0, width);
  at::Tensor out = gate * at::sigmoid(gate) * wide.narrow(1, width, width);
  if (weights_R.defined()) out = out * column(weights_R);
  return out.to(gate_up_RG.scalar_type());
}

SwigluGradients swiglu_backward_aten(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                                     const at::Tensor& weights_R) {
  const auto wide = at::toOpMathType(gate_up_RG.scalar_type());
  const std::int64_t width = gate_up_RG.size(1) / 2;
  const at::Tensor grad = grad_RF.to(wide);
  const at::Tensor gate = gate_up_RG.narrow(1, 0, width).to(wide);
  const at::Tensor up = gate_up_RG.narrow(1, width, width).to(wide);
  const at::Tensor s = at::sigmoid(gate);
  const at::Tensor silu = gate * s;
  const at::Tensor weighted = weights_R.defined() ? grad * column(weights_R.to(wide)) : grad;
  SwigluGradients result;
  result.gate_up_RG =
      at::cat({weighted * up * s * (1 + gate * (1 - s)), weighted * silu}, 1).to(gate_up_RG.scalar_type());
  if (weights_R.defined()) result.weights_R = (grad * silu * up).sum(1).to(weights_R.scalar_type());
  return result;
}

}  // namespace collegium::ops
