// SPDX-License-Identifier: Apache-2.0
#include "collegium/ops/swiglu.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sigmoid.h>

#include "collegium/base/error.h"

namespace collegium::ops {

namespace {

constexpr std::int64_t kRowsPerTask = 16;

at::Tensor column(const at::Tensor& weights_R) { return weights_R.unsqueeze(1); }

// Loads and stores of `Wide` lanes from T: bf16 is widened to two registers of fp32 by at::vec; here one half
// at a time so that every dtype runs the same loop.
template <typename T>
struct Lanes {
  using Wide = at::opmath_type<T>;
  using Vector = at::vec::Vectorized<Wide>;
  static constexpr std::int64_t kSize = Vector::size();

  static Vector load(const T* source, std::int64_t count) {
    if constexpr (std::is_same_v<T, Wide>) {
      return Vector::loadu(source, count);
    } else {
      Vector low;
      Vector high;
      std::tie(low, high) = at::vec::convert_to_float(at::vec::Vectorized<T>::loadu(source, count));
      return low;
    }
  }
  static void store(const Vector& value, T* target, std::int64_t count) {
    if constexpr (std::is_same_v<T, Wide>) {
      value.store(target, static_cast<int>(count));
    } else {
      at::vec::convert_from_float<T>(value, Vector(Wide{0})).store(target, static_cast<int>(count));
    }
  }
};

template <typename Vector>
Vector sigmoid(const Vector& z) {
  return (Vector(1) + z.neg().exp()).reciprocal();
}

template <typename T, typename Wide>
void forward_row(const T* gate, const T* up, Wide weight, std::int64_t width, T* out) {
  using L = Lanes<T>;
  for (std::int64_t f = 0; f < width; f += L::kSize) {
    const std::int64_t count = std::min(L::kSize, width - f);
    const auto g = L::load(gate + f, count);
    L::store(typename L::Vector(weight) * g * sigmoid(g) * L::load(up + f, count), out + f, count);
  }
}

// Returns the weight's gradient: the sum runs lane by lane, then over the lanes in order, for any thread
// count.
template <typename T, typename Wide>
Wide backward_row(const T* grad, const T* gate, const T* up, Wide weight, std::int64_t width, T* grad_gate,
                  T* grad_up) {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  Vector dot(Wide{0});
  const Vector w(weight);
  const Vector one(Wide{1});
  for (std::int64_t f = 0; f < width; f += L::kSize) {
    const std::int64_t count = std::min(L::kSize, width - f);
    const Vector da = L::load(grad + f, count);
    const Vector g = L::load(gate + f, count);
    const Vector u = L::load(up + f, count);
    const Vector s = sigmoid(g);
    const Vector silu = g * s;
    const Vector term = da * silu * u;
    dot = dot + (count == L::kSize ? term : Vector::set(Vector(Wide{0}), term, count));
    L::store(w * da * u * s * (one + g * (one - s)), grad_gate + f, count);
    L::store(w * da * silu, grad_up + f, count);
  }
  std::array<Wide, static_cast<std::size_t>(L::kSize)> lanes{};
  dot.store(lanes.data());
  Wide sum{0};
  for (const Wide lane : lanes) sum += lane;
  return sum;
}

void check_shapes(const at::Tensor& gate_up_RG, const at::Tensor& weights_R) {
  COLLEGIUM_CHECK(gate_up_RG.dim() == 2 && gate_up_RG.size(1) % 2 == 0, "gate_up must be [R, 2F]");
  COLLEGIUM_CHECK(!weights_R.defined() || weights_R.numel() == gate_up_RG.size(0), "{} weights for {} rows",
                  weights_R.numel(), gate_up_RG.size(0));
}

}  // namespace

at::Tensor swiglu(const at::Tensor& gate_up_RG, const at::Tensor& weights_R) {
  check_shapes(gate_up_RG, weights_R);
  if (!gate_up_RG.is_cpu()) return swiglu_aten(gate_up_RG, weights_R);
  const at::Tensor hidden = gate_up_RG.contiguous();
  const std::int64_t width = hidden.size(1) / 2;
  at::Tensor out_RF = at::empty({hidden.size(0), width}, hidden.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, hidden.scalar_type(), "swiglu", [&] {
    using Wide = at::opmath_type<scalar_t>;
    const at::Tensor weights =
        weights_R.defined() ? weights_R.to(c10::CppTypeToScalarType<Wide>::value).contiguous() : at::Tensor();
    const auto* w = weights.defined() ? weights.const_data_ptr<Wide>() : nullptr;
    const auto* h = hidden.const_data_ptr<scalar_t>();
    auto* out = out_RF.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, hidden.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const scalar_t* gate = h + row * 2 * width;
        forward_row(gate, gate + width, w != nullptr ? w[row] : Wide{1}, width, out + row * width);
      }
    });
  });
  return out_RF;
}

SwigluGradients swiglu_backward(const at::Tensor& grad_RF, const at::Tensor& gate_up_RG,
                                const at::Tensor& weights_R) {
  check_shapes(gate_up_RG, weights_R);
  if (!gate_up_RG.is_cpu()) return swiglu_backward_aten(grad_RF, gate_up_RG, weights_R);
  const at::Tensor grad = grad_RF.contiguous();
  const at::Tensor hidden = gate_up_RG.contiguous();
  const std::int64_t width = hidden.size(1) / 2;
  SwigluGradients result{.gate_up_RG = at::empty_like(hidden), .weights_R = {}};
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, hidden.scalar_type(), "swiglu_backward", [&] {
    using Wide = at::opmath_type<scalar_t>;
    const auto wide = c10::CppTypeToScalarType<Wide>::value;
    const at::Tensor weights = weights_R.defined() ? weights_R.to(wide).contiguous() : at::Tensor();
    at::Tensor grad_weights_R = at::empty({hidden.size(0)}, hidden.options().dtype(wide));
    const auto* w = weights.defined() ? weights.const_data_ptr<Wide>() : nullptr;
    auto* dw = grad_weights_R.mutable_data_ptr<Wide>();
    const auto* da = grad.const_data_ptr<scalar_t>();
    const auto* h = hidden.const_data_ptr<scalar_t>();
    auto* dh = result.gate_up_RG.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, hidden.size(0), kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t base = row * 2 * width;
        dw[row] = backward_row(da + row * width, h + base, h + base + width, w != nullptr ? w[row] : Wide{1},
                               width, dh + base, dh + base + width);
      }
    });
    if (weights_R.defined()) result.weights_R = grad_weights_R.to(weights_R.scalar_type());
  });
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
