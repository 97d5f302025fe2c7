// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::model {

namespace {

using ops::row_math::narrow;
using ops::row_math::Wide;
using ops::row_math::widen;

// Rows per task and per partial sum of the weight's gradient: fixed, so that no result depends on threads.
constexpr std::int64_t kNormRowsPerTask = 128;

template <typename T>
COLLEGIUM_INLINE void forward_rows(const T* x, const T* weight, std::int64_t rows, std::int64_t width,
                                   Wide<T> eps, T* y, Wide<T>* inverse_rms) {
  using W = Wide<T>;
  for (std::int64_t row = 0; row < rows; ++row, x += width, y += width) {
    const W squares =
        ops::row_math::lane_sum<W>(width, [x](std::int64_t i) { return widen(x[i]) * widen(x[i]); });
    const W scale = W{1} / std::sqrt(squares / static_cast<W>(width) + eps);
    inverse_rms[row] = scale;
    for (std::int64_t i = 0; i < width; ++i) {
      y[i] = narrow<T>(widen(narrow<T>(widen(x[i]) * scale)) * widen(weight[i]));
    }
  }
}

// With n = x / rms: dx = (g - n mean(g n)) / rms where g = dy w, and dw += dy n.
template <typename T>
COLLEGIUM_INLINE void backward_rows(const T* grad, const T* x, const T* weight, const Wide<T>* inverse_rms,
                                    std::int64_t rows, std::int64_t width, T* grad_x, Wide<T>* grad_weight) {
  using W = Wide<T>;
  for (std::int64_t row = 0; row < rows; ++row, x += width, grad += width, grad_x += width) {
    const W scale = inverse_rms[row];
    const W dot = ops::row_math::lane_sum<W>(
        width, [&](std::int64_t i) { return widen(grad[i]) * widen(weight[i]) * widen(x[i]); });
    const W mean = dot * scale * scale / static_cast<W>(width);
    for (std::int64_t i = 0; i < width; ++i) {
      const W value = widen(x[i]);
      grad_x[i] = narrow<T>(scale * (widen(grad[i]) * widen(weight[i]) - value * mean));
      grad_weight[i] += widen(grad[i]) * value * scale;
    }
  }
}

COLLEGIUM_CLONES void forward(const double* x, const double* w, std::int64_t rows, std::int64_t width,
                              double eps, double* y, double* inverse_rms) {
  forward_rows(x, w, rows, width, eps, y, inverse_rms);
}
COLLEGIUM_CLONES void forward(const float* x, const float* w, std::int64_t rows, std::int64_t width,
                              float eps, float* y, float* inverse_rms) {
  forward_rows(x, w, rows, width, eps, y, inverse_rms);
}
COLLEGIUM_CLONES void forward(const c10::BFloat16* x, const c10::BFloat16* w, std::int64_t rows,
                              std::int64_t width, float eps, c10::BFloat16* y, float* inverse_rms) {
  forward_rows(x, w, rows, width, eps, y, inverse_rms);
}
COLLEGIUM_CLONES void backward(const double* grad, const double* x, const double* w,
                               const double* inverse_rms, std::int64_t rows, std::int64_t width,
                               double* grad_x, double* grad_w) {
  backward_rows(grad, x, w, inverse_rms, rows, width, grad_x, grad_w);
}
COLLEGIUM_CLONES void backward(const float* grad, const float* x, const float* w, const float* inverse_rms,
                               std::int64_t rows, std::int64_t width, float* grad_x, float* grad_w) {
  backward_rows(grad, x, w, inverse_rms, rows, width, grad_x, grad_w);
}
COLLEGIUM_CLONES void backward(const c10::BFloat16* grad, const c10::BFloat16* x, const c10::BFloat16* w,
                               const float* inverse_rms, std::int64_t rows, std::int64_t width,
                               c10::BFloat16* grad_x, float* grad_w) {
  backward_rows(grad, x, w, inverse_rms, rows, width, grad_x, grad_w);
}

at::ScalarType wide_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight_D, double eps) {
    const at::Tensor x = input.contiguous();
    const at::Tensor w = weight_D.contiguous();
    const std::int64_t width = w.numel();
    const std::int64_t rows = x.numel() / width;
    at::Tensor y = at::empty_like(x);
    at::Tensor inverse_rms = at::empty({rows}, x.options().dtype(wide_type(x.scalar_type())));
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "rms_norm", [&] {
      using W = Wide<scalar_t>;
      const auto* x_data = x.const_data_ptr<scalar_t>();
      const auto* w_data = w.const_data_ptr<scalar_t>();
      auto* y_data = y.mutable_data_ptr<scalar_t>();
      auto* rms_data = inverse_rms.mutable_data_ptr<W>();
      at::parallel_for(0, rows, kNormRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
        model::forward(x_data + begin * width, w_data, end - begin, width, static_cast<W>(eps),
                       y_data + begin * width, rms_data + begin);
      });
    });
    context->save_for_backward({x, w, inverse_rms});
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& x = saved[0];
    const at::Tensor& w = saved[1];
    const at::Tensor grad = gradients[0].contiguous();
    const std::int64_t width = w.numel();
    const std::int64_t rows = x.numel() / width;
    const std::int64_t tasks = (rows + kNormRowsPerTask - 1) / kNormRowsPerTask;
    at::Tensor grad_x = at::empty_like(x);
    at::Tensor partial_PD = at::zeros({tasks, width}, saved[2].options());
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "rms_norm_backward", [&] {
      using W = Wide<scalar_t>;
      const auto* grad_data = grad.const_data_ptr<scalar_t>();
      const auto* x_data = x.const_data_ptr<scalar_t>();
      const auto* w_data = w.const_data_ptr<scalar_t>();
      const auto* rms_data = saved[2].const_data_ptr<W>();
      auto* grad_x_data = grad_x.mutable_data_ptr<scalar_t>();
      auto* partial_data = partial_PD.mutable_data_ptr<W>();
      at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          const std::int64_t row = task * kNormRowsPerTask;
          model::backward(grad_data + row * width, x_data + row * width, w_data, rms_data + row,
                          std::min(kNormRowsPerTask, rows - row), width, grad_x_data + row * width,
                          partial_data + task * width);
        }
      });
    });
    return {grad_x, partial_PD.sum(0).to(w.scalar_type()), {}};
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight_D, double eps) {
  COLLEGIUM_CHECK(x.size(-1) == weight_D.numel(), "norm of width {} with a weight of {} elements", x.size(-1),
                  weight_D.numel());
  if (!x.is_cpu()) return rms_norm_aten(x, weight_D, eps);
  return RmsNorm::apply(x, weight_D, eps);
}

at::Tensor rms_norm_aten(const at::Tensor& x, const at::Tensor& weight_D, double eps) {
  const at::Tensor wide = x.to(wide_type(x.scalar_type()));
  const at::Tensor normal = wide * at::rsqrt(wide.square().mean(-1, true) + eps);
  return normal.to(x.scalar_type()) * weight_D;
}

}  // namespace collegium::model
