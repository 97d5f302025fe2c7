// SPDX-License-Identifier: Apache-2.0
#include "collegium/model/rotary.h"

#include <ATen/ATen.h>

#include <cmath>

namespace collegium::model {

RotaryTables rotary_tables(std::int64_t first, std::int64_t count, std::int64_t head_dim, double theta,
                           at::ScalarType dtype) {
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor exponents = at::arange(0, head_dim, 2, at::dtype(wide)) / static_cast<double>(head_dim);
  const at::Tensor frequencies =
      at::reciprocal(at::pow(at::scalar_tensor(theta, at::dtype(wide)), exponents));
  const at::Tensor positions = at::arange(first, first + count, at::dtype(wide));
  const at::Tensor angles = positions.unsqueeze(1) * frequencies.unsqueeze(0);
  const at::Tensor doubled = at::cat({angles, angles}, 1);
  return {.cos_SA = at::cos(doubled).to(dtype), .sin_SA = at::sin(doubled).to(dtype)};
}

at::Tensor apply_rotary(const at::Tensor& x_BHSA, const RotaryTables& tables) {
  const std::int64_t half = x_BHSA.size(-1) / 2;
  const at::Tensor low = x_BHSA.narrow(-1, 0, half);
  const at::Tensor high = x_BHSA.narrow(-1, half, half);
  return x_BHSA * tables.cos_SA + at::cat({-high, low}, -1) * tables.sin_SA;
}

}  // namespace collegium::model
