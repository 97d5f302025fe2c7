// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/swiglu.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sigmoid.h>

#include <algorithm>
#include <array>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::ops {

namespace {

using row_math::narrow;
using row_math::Wide;
using row_math::widen;

constexpr std::int64_t kRowsPerTask = 16;

at::Tensor column(const at::Tensor& weights_R) { return weights_R.unsqueeze(1); }

template <typename T>
COLLEGIUM_INLINE void forward_rows(const T* h, const Wide<T>* weights, std::int64_t rows, std::int64_t width,
                                   T* all_out) {
  using W = Wide<T>;
  for (std::int64_t row = 0; row < rows; ++row, h += 2 * width) {
    const W weight = weights != nullptr ? weights[row] : W{1};
    T* __restrict__ out = all_out + row * width;
    for (std::int64_t f = 0; f < width; ++f) {
      const W gate = widen(h[f]);
      const W silu = gate * row_math::sigmoid(gate);
      out[f] = narrow<T>(weight * (silu * widen(h[width + f])));
    }
  }
}

template <typename T>
struct BackwardRows {
  const T* grad;
  const T* h;
  const Wide<T>* weights;
  std::int64_t rows;
  std::int64_t width;
  T* grad_h;
  Wide<T>* grad_weights;
  T* activation;
};

// Columns whose share of the weight's gradient is summed at a time, in a fixed order.
constexpr std::int64_t kColumnsPerPass = 128;

// `keep` writes the activation too.
template <bool keep, typename T>
COLLEGIUM_INLINE void backward_rows(BackwardRows<T> o) {
  using W = Wide<T>;
  std::array<W, kColumnsPerPass> terms;
  W* __restrict__ term = terms.data();
  for (std::int64_t row = 0; row < o.rows; ++row) {
    const W weight = o.weights != nullptr ? o.weights[row] : W{1};
    W dot{0};
    for (std::int64_t first = 0; first < o.width; first += kColumnsPerPass) {
      const std::int64_t columns = std::min(kColumnsPerPass, o.width - first);
      const T* gate = o.h + row * 2 * o.width + first;
      const T* up = gate + o.width;
      const T* grad = o.grad + row * o.width + first;
      T* __restrict__ grad_gate = o.grad_h + row * 2 * o.width + first;
      T* __restrict__ grad_up = grad_gate + o.width;
      T* __restrict__ activation = keep ? o.activation + row * o.width + first : nullptr;
#pragma GCC ivdep
      for (std::int64_t f = 0; f < columns; ++f) {
        const W g = widen(gate[f]);
        const W u = widen(up[f]);
        const W da = widen(grad[f]);
        const W s = row_math::sigmoid(g);
        const W silu = g * s;
        const W product = silu * u;
        grad_gate[f] = narrow<T>(weight * da * u * s * (W{1} + g * (W{1} - s)));
        grad_up[f] = narrow<T>(weight * da * silu);
        if constexpr (keep) activation[f] = narrow<T>(weight * product);
        term[f] = da * product;
      }
      dot += row_math::lane_sum<W>(columns, [term](std::int64_t f) { return term[f]; });
    }
    if (o.grad_weights != nullptr) o.grad_weights[row] = dot;
  }
}

COLLEGIUM_CLONES void forward(const double* h, const double* weights, std::int64_t rows, std::int64_t width,
                              double* out) {
  forward_rows(h, weights, rows, width, out);
}
COLLEGIUM_CLONES void forward(const float* h, const float* weights, std::int64_t rows, std::int64_t width,
                              float* out) {
  forward_rows(h, weights, rows, width, out);
}
COLLEGIUM_CLONES void forward(const c10::BFloat16* h, const float* weights, std::int64_t rows,
                              std::int64_t width, c10::BFloat16* out) {
  forward_rows(h, weights, rows, width, out);
}
COLLEGIUM_CLONES void backward(const BackwardRows<double>& o) { backward_rows<false>(o); }
COLLEGIUM_CLONES void backward(const BackwardRows<float>& o) { backward_rows<false>(o); }
COLLEGIUM_CLONES void backward(const BackwardRows<c10::BFloat16>& o) { backward_rows<false>(o); }
COLLEGIUM_CLONES void backward_keep(const BackwardRows<double>& o) { backward_rows<true>(o); }
COLLEGIUM_CLONES void backward_keep(const BackwardRows<float>& o) { backward_rows<true>(o); }
COLLEGIUM_CLONES void backward_keep(const BackwardRows<c10::BFloat16>& o) { backward_rows<true>(o); }

void check_shapes(const at::Tensor& gate_up_RG, const at::Tensor& weights_R) {
  COLLEGIUM_CHECK(gate_up_RG.dim() == 2 && gate_up_RG.size(1) % 2 == 0, "gate_up must be [R, 2F]");
  COLLEGIUM_CHECK(!weights_R.defined() || weights_R.numel() == gate_up_RG.size(0), "{} weights for {} rows",
                  weights_R.numel(), gate_up_RG.size(0));
}

// Weights in the type of the inner math.
at::Tensor inner_weights(const at::Tensor& weights_R, at::ScalarType dtype) {
  return weights_R.defined() ? weights_R.to(at::toOpMathType(dtype)).contiguous() : at::Tensor();
}

template <typename W>
const W* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<W>() : nullptr;
}

}  // namespace

void swiglu_into(const at::Tensor& gate_up_RG, const at::Tensor& weights_R, const at::Tensor& out_RF) {
  const std::int64_t width = gate_up_RG.size(1) / 2;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, gate_up_RG.scalar_type(), "swiglu", [&] {
    const auto* weights = data_or_null<Wide<scalar_t>>(weights_R);
    const auto* h = gate_up_RG.const_data_ptr<scalar_t>();
    auto* out = out_RF.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, gate_up_RG.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      forward(h + begin * 2 * width, weights != nullptr ? weights + begin : nullptr, end - begin, width,
              out + begin * width);
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
  const std::int64_t width = gate_up_RG.size(1) / 2;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, gate_up_RG.scalar_type(), "swiglu_backward", [&] {
    using W = Wide<scalar_t>;
    const BackwardRows<scalar_t> all = {
        .grad = grad_RF.const_data_ptr<scalar_t>(),
        .h = gate_up_RG.const_data_ptr<scalar_t>(),
        .weights = data_or_null<W>(weights_R),
        .rows = gate_up_RG.size(0),
        .width = width,
        .grad_h = out.gate_up_RG.mutable_data_ptr<scalar_t>(),
        .grad_weights = out.weights_R.defined() ? out.weights_R.mutable_data_ptr<W>() : nullptr,
        .activation = activation_RF.defined() ? activation_RF.mutable_data_ptr<scalar_t>() : nullptr};
    at::parallel_for(0, all.rows, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      const auto from = [begin](auto* data, std::int64_t columns) {
        return data != nullptr ? data + begin * columns : nullptr;
      };
      const BackwardRows<scalar_t> part = {.grad = from(all.grad, width),
                                           .h = from(all.h, 2 * width),
                                           .weights = from(all.weights, 1),
                                           .rows = end - begin,
                                           .width = width,
                                           .grad_h = from(all.grad_h, 2 * width),
                                           .grad_weights = from(all.grad_weights, 1),
                                           .activation = from(all.activation, width)};
      part.activation != nullptr ? backward_keep(part) : backward(part);
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
