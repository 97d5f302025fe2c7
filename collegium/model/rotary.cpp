// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/rotary.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>
#include <torch/csrc/autograd/custom_function.h>

#include "collegium/base/error.h"
#include "collegium/ops/row_math.h"

namespace collegium::model {

namespace {

using ops::row_math::narrow;
using ops::row_math::Wide;
using ops::row_math::widen;

constexpr std::int64_t kPositionsPerTask = 16;

// One position: all its heads turn by the same angles; direction -1 turns back (the gradient).
template <typename T>
COLLEGIUM_INLINE void rotate_heads(const T* x, const Wide<T>* cosine, const Wide<T>* sine, Wide<T> direction,
                                   std::int64_t heads, std::int64_t half, T* y) {
  using W = Wide<T>;
  for (std::int64_t head = 0; head < heads; ++head, x += 2 * half, y += 2 * half) {
    for (std::int64_t i = 0; i < half; ++i) {
      const W first = widen(x[i]);
      const W second = widen(x[i + half]);
      const W turned_sine = direction * sine[i];
      y[i] = narrow<T>(first * cosine[i] - second * turned_sine);
      y[i + half] = narrow<T>(second * cosine[i] + first * turned_sine);
    }
  }
}

COLLEGIUM_CLONES void rotate(const double* x, const double* c, const double* s, double direction,
                             std::int64_t heads, std::int64_t half, double* y) {
  rotate_heads(x, c, s, direction, heads, half, y);
}
COLLEGIUM_CLONES void rotate(const float* x, const float* c, const float* s, float direction,
                             std::int64_t heads, std::int64_t half, float* y) {
  rotate_heads(x, c, s, direction, heads, half, y);
}
COLLEGIUM_CLONES void rotate(const c10::BFloat16* x, const float* c, const float* s, float direction,
                             std::int64_t heads, std::int64_t half, c10::BFloat16* y) {
  rotate_heads(x, c, s, direction, heads, half, y);
}

at::Tensor rotate_all(const at::Tensor& input, const at::Tensor& cos, const at::Tensor& sin,
                      double direction) {
  const at::Tensor x_BSHA = input.contiguous();
  const std::int64_t length = x_BSHA.size(1);
  const std::int64_t heads = x_BSHA.size(2);
  const std::int64_t half = x_BSHA.size(3) / 2;
  at::Tensor y_BSHA = at::empty_like(x_BSHA);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x_BSHA.scalar_type(), "rotary", [&] {
    using W = Wide<scalar_t>;
    const auto* x = x_BSHA.const_data_ptr<scalar_t>();
    const auto* cos_data = cos.const_data_ptr<W>();
    const auto* sin_data = sin.const_data_ptr<W>();
    auto* y = y_BSHA.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x_BSHA.size(0) * length, kPositionsPerTask,
                     [&](std::int64_t begin, std::int64_t end) {
                       for (std::int64_t token = begin; token < end; ++token) {
                         const std::int64_t offset = token * heads * 2 * half;
                         const std::int64_t angle = token % length * half;
                         rotate(x + offset, cos_data + angle, sin_data + angle, static_cast<W>(direction),
                                heads, half, y + offset);
                       }
                     });
  });
  return y_BSHA;
}

class Rotary : public torch::autograd::Function<Rotary> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x_BSHA,
                            const at::Tensor& cos, const at::Tensor& sin) {
    context->save_for_backward({cos, sin});
    return rotate_all(x_BSHA, cos, sin, 1.0);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    return {rotate_all(gradients[0], saved[0], saved[1], -1.0), {}, {}};
  }
};

}  // namespace

RotaryTables rotary_tables(std::int64_t first, std::int64_t count, std::int64_t head_dim, double theta,
                           const at::TensorOptions& options) {
  COLLEGIUM_CHECK(head_dim % 2 == 0, "rotary embedding of a head of {} dims", head_dim);
  const at::Tensor exponents = at::arange(0, head_dim, 2, at::kDouble) / static_cast<double>(head_dim);
  const at::Tensor frequencies = at::pow(at::Scalar(theta), exponents).reciprocal();
  const at::Tensor positions = at::arange(first, first + count, at::kDouble);
  const at::Tensor angles = at::outer(positions, frequencies);
  const auto wide = options.dtype(options.dtype() == at::kDouble ? at::kDouble : at::kFloat);
  return {.cos = angles.cos().to(wide), .sin = angles.sin().to(wide)};
}

at::Tensor apply_rotary(const at::Tensor& x_BSHA, const RotaryTables& tables) {
  COLLEGIUM_CHECK(
      x_BSHA.dim() == 4 && x_BSHA.size(1) == tables.cos.size(0) && x_BSHA.size(3) == 2 * tables.cos.size(1),
      "rotary tables of {} positions for a sequence of {}", tables.cos.size(0), x_BSHA.size(1));
  if (!x_BSHA.is_cpu()) return apply_rotary_aten(x_BSHA, tables);
  return Rotary::apply(x_BSHA, tables.cos, tables.sin);
}

at::Tensor apply_rotary_aten(const at::Tensor& x_BSHA, const RotaryTables& tables) {
  const at::Tensor wide = x_BSHA.to(tables.cos.scalar_type());
  const auto halves = wide.chunk(2, -1);
  const at::Tensor cos = tables.cos.unsqueeze(1);
  const at::Tensor sin = tables.sin.unsqueeze(1);
  return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1)
      .to(x_BSHA.scalar_type());
}

}  // namespace collegium::model
